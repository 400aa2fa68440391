"""The GPU kernels without a GPU: their division is IEEE's, and what compilers make of them ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from qatscale.quant.bit_widths import BY_TEXT
from tests.quant.triton_interpreted import REASON, Array, fma, interpreted_kernels

# --- one reciprocal a row, and Markstein's correction ---


def divided(w: Array, scale: Array) -> Array:
    """`triton_kernels._divide`, which the interpreted kernels run in test_quant_kernels.py."""
    with np.errstate(all="ignore"):
        reciprocal = np.float32(1) / scale
        quotient = w * reciprocal
        return fma(fma(-quotient, scale, w), reciprocal, quotient)


def assert_ieee(w: Array, scale: Array) -> None:
    np.testing.assert_array_equal(divided(w, scale), w / scale)


def test_the_emulated_fma_rounds_once() -> None:
    """Against exact fractions, on sums that cancel, sums close to a tie and the smallest numbers."""
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal(3000).astype(np.float32) for _ in range(2))
    z = np.concatenate([
        -(x * y)[:1000], (generator.integers(1, 2**24, 1000) * 2.0**-50).astype(np.float32),
        np.float32(2**24) * x[2000:] * y[2000:],
    ])  # fmt: skip
    x[:500] *= np.float32(2**-140)
    for a, b, c, found in zip(x.tolist(), y.tolist(), z.tolist(), fma(x, y, z), strict=True):
        exact, near = Fraction(a) * Fraction(b) + Fraction(c), [found]
        near += [np.nextafter(found, np.float32(end)) for end in (np.inf, -np.inf)]
        errors = [abs(Fraction(float(one)) - exact) for one in near]
        assert errors[0] == min(errors)
        if errors.count(errors[0]) == 2:
            assert found.view(np.int32) % 2 == 0, "ties go to even"


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 7), ("fp16", 10)])
def test_all_quotients_of_16_bits(dtype: str, bits: int) -> None:
    """All pairs of significands; a power of 2 scales all steps, as long as nothing leaves the range."""
    significands = (np.arange(2**bits, 2 ** (bits + 1)) / 2**bits).astype(np.float32)
    w, scale = (grid.reshape(-1) for grid in np.meshgrid(significands, significands))
    for up, down in ((0, 0), (13, -15), (-90, -16), (60, 9)) if dtype == "bf16" else ((0, 0), (-13, 2)):
        assert_ieee(w * np.float32(2.0**up), scale * np.float32(2.0**down))


@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_quotients_of_fp32(rounds: int) -> None:
    """Half a million a round at random, and as many of the hardest, next to the middle of two fp32 numbers."""
    generator = np.random.default_rng(1)
    for _ in range(rounds):
        scale = np.exp(generator.uniform(np.log(1e-5), np.log(10), 500_000)).astype(np.float32)
        w = (scale * generator.uniform(-9, 9, scale.size)).astype(np.float32)
        assert_ieee(w, scale)
        middle = (generator.integers(2**23, 2**24, scale.size) + 0.5) / 2**23
        hardest = (scale.astype(np.float64) * middle).astype(np.float32)
        for near in (hardest, np.nextafter(hardest, np.float32(0)), np.nextafter(hardest, np.float32(np.inf))):
            assert_ieee(near[: near.size // 3], scale[: near.size // 3])


def test_the_ends_of_the_range() -> None:
    floor, largest = np.float32(1e-5), np.float32(1e37)
    ones = np.arange(2**24 - 64, 2**24, dtype=np.float32) / np.float32(2**23)  # significands of all ones and near
    assert_ieee(*(grid.reshape(-1) for grid in np.meshgrid(ones, ones)))
    w = np.geomspace(1.01e-30, 9e32, 20_001).astype(np.float32)
    assert_ieee(w, np.full_like(w, floor))
    assert_ieee(w[w > 1e6], np.full_like(w[w > 1e6], largest))
    tiny = np.geomspace(1e-45, 1e-30, 20_001).astype(np.float32)  # the remainder underflows: no code can tell
    for scale in (floor, np.float32(1), np.float32(1e3)):
        error = divided(tiny, np.full_like(tiny, scale)).astype(np.float64) - tiny.astype(np.float64) / float(scale)
        assert np.abs(error).max() < 1e-30


# --- compiled ahead of time ---

COMPILER = Path(__file__).with_name("compiled_kernels.py")
ALL = [
    "-".join(parts)
    for parts in product(
        BY_TEXT, ("bf16-bf16", "fp32-fp32", "bf16-fp32"), ("quantize", "gradients"), ("80", "90", "100"), ("4096",)
    )
]
IN_SUITE = [
    *(f"{bits}-bf16-bf16-{kernel}-90-4096" for bits in ("2", "4") for kernel in ("quantize", "gradients")),
    "4-fp32-fp32-gradients-80-4096", "4-bf16-bf16-gradients-100-4096", "4-bf16-bf16-quantize-90-1280",
]  # fmt: skip


@pytest.mark.parametrize("variants", [IN_SUITE, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_what_ptxas_makes_of_them(variants: list[str], tmp_path: Path) -> None:
    """No spills, no atomics, 128-bit accesses to weights, and registers for six programs of 128 threads and more."""
    pytest.importorskip("triton", reason=REASON)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, COMPILER, *variants], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == set(variants)
    for variant, made in found.items():
        assert made["local"] == 0, variant
        assert made["registers"] <= (40 if "quantize" in variant else 80), variant
        kinds = {kind: [m for m in made["memory"] if m.startswith(kind)] for kind in ("LDG", "STG")}
        assert sum(map(len, kinds.values())) == len(made["memory"]), f"{variant}: {made['memory']}"
        reads, writes = (1, 1) if "quantize" in variant else (2, 1)
        vectors = 4 if "fp32-fp32" in variant else 2  # 16 weights a thread
        expected = (vectors * reads, vectors * writes)
        assert tuple(sum(m.endswith(".128") for m in kind) for kind in kinds.values()) == expected, variant
        assert len(kinds["LDG"]) <= vectors * reads + 2, f"{variant}: of scales one load for each row of a thread"


@pytest.mark.parametrize(("channels", "forward", "backward"), [
    (768, (8, 256), (2, 1024)), (1280, (8, 256), (4, 512)), (2560, (4, 512), (4, 512)), (4096, (1, 2048), (1, 2048)),
    (2048, (1, 2048), (1, 2048)), (128, (16, 128), (16, 128)), (1, (2048, 1), (2048, 1)), (100, (16, 128), (16, 128)),
])  # fmt: skip
def test_tiles_fit_the_rows(channels: int, forward: tuple[int, int], backward: tuple[int, int]) -> None:
    kernels = interpreted_kernels()
    assert kernels.FORWARD.of(channels) == forward
    assert kernels.BACKWARD.of(channels) == backward
