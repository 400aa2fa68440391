"""Initial weights: their law, their generator, and that any process draws any part of them with the same bits."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from qatscale.config.schema import ModelConfig
from qatscale.model.initial_weights import InitialWeights, box_muller, initialise
from qatscale.model.llama import Llama, is_norm, parameter_shapes
from qatscale.model.tensor_parallel import TensorParallel, mark

CONFIG = ModelConfig(
    vocab_size=500, hidden_size=64, layers=8, heads=4, kv_heads=2, intermediate_size=160, tied_embedding=False,
    init_std=0.03,
)  # fmt: skip
NAME = "blocks.1.mlp.up.weight"


def drawn(name: str, config: ModelConfig = CONFIG, seed: int = 11, version: int = 2) -> Tensor:
    value = torch.zeros(parameter_shapes(config)[name])
    InitialWeights(config, seed, version).fill(value, name)  # type: ignore[arg-type]
    return value


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(CONFIG)
    initialise(model, seed=11)
    return model


def test_matrices_are_normal_with_the_documented_deviation(model: Llama) -> None:
    """Mean, deviation and shape of every matrix within 5 standard errors (about 60 of them: 1 in 30,000 by chance)."""
    for name, parameter in model.named_parameters():
        if is_norm(name):
            continue
        residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
        std = 0.03 / math.sqrt(2 * 8) if residual else 0.03
        values, n = parameter.detach().double().flatten(), parameter.numel()
        assert abs(values.mean().item()) < 5 * std / math.sqrt(n), name
        assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
        assert stats.kstest(values.numpy() / std, "norm").pvalue > 1e-6, name


def test_norms_are_one(model: Llama) -> None:
    norms = [p for n, p in model.named_parameters() if is_norm(n)]
    assert len(norms) == 2 * 8 + 1
    assert all(torch.equal(p, torch.ones(64)) for p in norms)


def test_draws_are_independent(model: Llama) -> None:
    """No two matrices of one shape agree, nor correlate by more than 6 standard errors; nor do the two of a pair."""
    seen: dict[torch.Size, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if is_norm(name):
            continue
        values = parameter.detach()
        pairs = torch.corrcoef(values.view(-1, 2).T)[0, 1].item()
        assert abs(pairs) < 6 / math.sqrt(values.numel() / 2), name
        for other, before in seen.get(values.shape, ()):
            r = torch.corrcoef(torch.stack((values.flatten(), before.flatten())))[0, 1].item()
            assert abs(r) < 6 / math.sqrt(values.numel()), (name, other)
        seen.setdefault(values.shape, []).append((name, values))


@pytest.mark.parametrize("version", [1, 2])
def test_a_draw_depends_on_seed_and_name_alone(version: int) -> None:
    value = drawn(NAME, version=version)
    assert torch.equal(value, drawn(NAME, CONFIG.model_copy(update={"layers": 2, "vocab_size": 9}), version=version))
    assert not torch.equal(value, drawn(NAME, seed=12, version=version))
    torch.manual_seed(5)  # the global generator has no say, and keeps its state
    expected_next = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(value, drawn(NAME, version=version))
    assert torch.equal(torch.rand(3), expected_next)


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10 as its authors publish it (Random123), in whole numbers."""
    mask = 2**64 - 1
    x = [counter >> 64 * i & mask for i in range(4)]
    keys = [key & mask, key >> 64]
    for _ in range(10):
        products = (0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2])
        x = [products[1] >> 64 ^ x[1] ^ keys[0], products[1] & mask, products[0] >> 64 ^ x[3] ^ keys[1],
             products[0] & mask]  # fmt: skip
        keys = [keys[0] + 0x9E3779B97F4A7C15 & mask, keys[1] + 0xBB67AE8584CAA73B & mask]
    return x


def test_the_second_version_is_the_documented_one() -> None:
    """Against Philox in whole numbers, which gives its authors' known answer, and Box-Muller in double precision."""
    assert philox(0, 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    key = int.from_bytes(hashlib.sha256(f"11:{NAME}".encode()).digest()[:16], "little")
    value = drawn(NAME).flatten()
    for counter in (0, 1, 77, len(value) // 8 - 1):
        outputs = philox(counter + 1, key)  # NumPy counts before it draws
        halves = [half for output in outputs for half in struct.unpack("<Ii", output.to_bytes(8, "little"))]
        for j in range(4):
            radius = 0.03 * math.sqrt(-2 * math.log((halves[2 * j] + 0.5) / 2**32))
            angle = 2 * math.pi * halves[2 * j + 1] / 2**32
            expected = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)])
            found = value[8 * counter + 2 * j : 8 * counter + 2 * j + 2]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_extreme_outputs_are_finite() -> None:
    ends = np.array([0, 2**32 - 1, 2**64 - 1, 2**63, 2**63 + 2**32 - 1], np.uint64)
    values = box_muller(ends, 1.0)
    assert np.isfinite(values).all()
    assert np.abs(values).max() == pytest.approx(math.sqrt(2 * 33 * math.log(2)))


def test_the_first_version_is_the_documented_one() -> None:
    digest = hashlib.sha256(b"11:embed.weight").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    expected = torch.normal(torch.zeros(500, 64), 1.0, generator=generator) * 0.03
    torch.testing.assert_close(drawn("embed.weight", version=1), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("dim", [0, 1])
def test_any_part_is_drawn_with_the_same_bits(dim: int, size: int, version: int) -> None:
    """Tensor-parallel parts with padding, and of each the shares of 3 processes, which cut rows. 35 columns: counters
    begin within a row."""
    config = CONFIG.model_copy(update={"vocab_size": 41, "hidden_size": 35})
    whole, weights = drawn("embed.weight", config, version=version), InitialWeights(config, 11, version)  # type: ignore[arg-type]
    if dim == 1 and 35 % size:
        return  # columns divide
    for rank in range(size):
        shard = TensorParallel(rank, size).shard(dim, whole.shape[dim])
        expected = shard.take(whole)
        part = torch.zeros(expected.shape)
        if size > 1:
            mark(part, shard)
        share = -(-part.numel() // 3)
        for start in range(0, part.numel(), share):
            part.zero_()
            weights.fill(part, "embed.weight", start, start + share)
            own = slice(start, start + share)
            assert torch.equal(part.flatten()[own], expected.flatten()[own])
        weights.fill(part, "embed.weight")
        assert torch.equal(part, expected)


def test_long_parameters_are_drawn_in_pieces() -> None:
    config = CONFIG.model_copy(update={"vocab_size": 3001})  # 192,064 elements; a piece has 32,768
    whole, part = drawn("embed.weight", config), torch.zeros(3001, 64)
    for row in (0, 511, 512, 513, 3000):
        InitialWeights(config, 11).fill(part, "embed.weight", row * 64, (row + 1) * 64)
        assert torch.equal(part[row], whole[row])


def test_a_processor_without_avx512_draws_the_same() -> None:
    code = (
        "import hashlib, numpy as np; from qatscale.model.initial_weights import box_muller;"
        "print(hashlib.sha256(box_muller(np.random.Philox(key=3).random_raw(100_000), 0.02)).hexdigest())"
    )
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = hashlib.sha256(box_muller(np.random.Philox(key=3).random_raw(100_000), 0.02)).hexdigest()  # type: ignore[arg-type]
    assert done.stdout.strip() == here


def test_a_bf16_model_gets_the_rounded_values() -> None:
    low = Llama(CONFIG).bfloat16()
    initialise(low, 11)
    for name, parameter in low.named_parameters():
        assert torch.equal(parameter, drawn(name).bfloat16())
