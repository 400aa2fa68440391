"""What a run records of its quantizers, against its own checkpoints."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from qatscale.engine.checkpoints.reader import CheckpointReader
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.reference import encode
from qatscale.tracking.run_folder import RunFolder
from tests.train.driving import STEPS, SWITCH, records
from tests.train.trained_runs import Trained


@pytest.mark.dist
@pytest.mark.parametrize("name", ["floored", "floored-p2"])
def test_scales_at_the_floor_and_flipping_codes_are_those_of_the_checkpoints(name: str, trained: Trained) -> None:
    folder = RunFolder(trained.runs / name)
    floored, codes = {}, {}
    for step in range(SWITCH + 1, STEPS + 1):
        reader = CheckpointReader(folder.checkpoints / f"step-{step:08d}")
        scales = {n: reader.parameter(n, "weight") for n in reader.manifest.parameters if n.endswith("weight_scale")}
        floored[step] = (torch.cat(list(scales.values())) <= 1e-5).double().mean().item()
        weights = {n: reader.parameter(n.removesuffix("_scale"), "weight") for n in scales}
        bits = {n: 4 if n.startswith("embed") else 1 for n in scales}
        codes[step] = torch.cat([encode(get_quantizer(bits[n]), weights[n], scales[n]).flatten() for n in scales])
    flips = {after: (codes[after] != codes[before]).double().mean().item() for before, after in pairwise(codes)}
    assert min(floored.values()) > 0.1
    assert min(flips.values()) > 0

    found = {record["step"]: record for record in records(folder.path)}
    assert all("scales_floored" not in found[step] for step in range(1, SWITCH + 1))
    assert {step: found[step]["scales_floored"] for step in floored} == pytest.approx(floored, rel=1e-12)
    assert {step: found[step]["code_flips"] for step in flips} == pytest.approx(flips, rel=1e-12)
    assert folder.final is not None
    assert folder.final["final/scales_floored"] == found[STEPS]["scales_floored"]


@pytest.mark.dist
@pytest.mark.parametrize("name", ["floored", "floored-p2"])
def test_what_is_quantized_is_stated_as_the_checkpoint_holds_it(name: str, trained: Trained) -> None:
    folder = RunFolder(trained.runs / name)
    reader = CheckpointReader(folder.checkpoints / f"step-{STEPS:08d}")
    sizes = {n: math.prod(about.shape) for n, about in reader.manifest.parameters.items()}
    params = sum(size for n, size in sizes.items() if not n.endswith("weight_scale"))
    weights = {4: sizes["embed.weight"], 1: 0}
    weights[1] = sum(sizes[n.removesuffix("_scale")] for n in sizes if n.endswith("_scale")) - weights[4]
    plain = sum(sizes.values()) - sum(weights.values())  # norms and scales, fp32
    stored = (4 * weights[4] + weights[1] + 32 * plain) / 8
    final = folder.final
    assert final is not None
    assert (final["bits"], final["n_params"], final["stored_bytes"]) == (1, params, stored)
    assert final["effective_bits"] == pytest.approx(8 * stored / params, rel=1e-12)
    assert final["tokens_per_stored_byte"] == pytest.approx(final["tokens_total"] / stored, rel=1e-12)
    shares = {bits: final[f"quantized_share/{bits}bit"] for bits in weights}
    assert shares == pytest.approx({bits: count / params for bits, count in weights.items()}, rel=1e-12)
    assert final["quantized_share"] == pytest.approx(sum(shares.values()), rel=1e-12)
    (switch,) = folder.records("switch")
    assert switch["report"]["quantized"] == {f"{bits}": count for bits, count in weights.items()}
    assert switch["report"]["model"]["bytes"] == stored


@pytest.mark.dist
def test_a_run_warns_once_of_scales_at_their_floor(trained: Trained) -> None:
    for ranks in (1, 2):
        assert trained.output[ranks].count("of the quantizer scales lie at their floor") == 1


@pytest.mark.dist
def test_a_run_without_quantization_has_neither(trained: Trained) -> None:
    trunk = RunFolder(trained.runs / "trunk")
    assert not any("scales_floored" in record or "code_flips" in record for record in records(trunk.path))
    assert trunk.final is not None
    assert trunk.final["final/scales_floored"] is None
