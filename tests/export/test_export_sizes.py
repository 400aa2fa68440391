"""The memory that the planner counts is the size of the exported file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qatlaw.bit_widths import BIT_WIDTHS
from qatlaw.plan.shapes import Shape, file_bytes
from qatscale.cli.plan import RecipesAndGpus
from qatscale.config.schema import ModelConfig, QatConfig
from qatscale.export.formats import FORMATS
from qatscale.export.formats.base import get_format
from qatscale.export.sizes import tensor_bytes
from qatscale.export.source import quantized_layers, source_parameters
from tests.export.export_runs import PLANNED
from tests.export.exported import described, need


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("run", "group_size", "bits"),
    [("planned", None, 1), ("planned", None, 2), ("planned", None, 4), ("planned-groups", 64, 4)],
)
def test_the_planner_counts_the_file(
    qatscale, runs: Path, tmp_path: Path, format: str, run: str, group_size: int | None, bits: float
) -> None:
    """Without the tokenizer, which llama.cpp's file holds as well."""
    need(format)
    code, _, error = qatscale(
        f"export {runs / run} --ptq {bits} --format {format} --out {tmp_path / 'out'} --fallback --no-verify "
        "--tokenizer none"
    )
    assert code == 0, error
    size = described(tmp_path / "out")["size"]
    widths, layers = np.array([PLANNED.hidden_size]), np.array([PLANNED.layers])
    sizes = RecipesAndGpus().file_size(format, group_size)
    (planned,) = file_bytes(widths, layers, PLANNED.vocabulary, bits, sizes)
    assert planned == pytest.approx(size["bytes"], rel=0.02)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_planner_counts_by_the_encodings_of_an_export(format: str, bits: float) -> None:
    need(format)
    for width, vocabulary in ((128, 1000), (256, 1001)):
        shape = Shape(width, 2, vocabulary)
        model = ModelConfig(
            vocab_size=vocabulary, hidden_size=width, layers=2, heads=1, intermediate_size=shape.intermediate_size
        )
        layers = quantized_layers(model, QatConfig(), bits)
        for group_size in (None, 32, 64, 128):
            stored = (
                get_format(format).stored(parameter, torch.bfloat16).size
                for parameter in source_parameters(model, layers, group_size)
            )
            assert tensor_bytes(format, shape, bits, group_size) == sum(stored), (width, group_size)


def test_the_planner_answers_by_the_format(qatscale) -> None:
    found = {}
    for options in ("", "--format hf", "--format gguf"):
        code, out, error = qatscale(f"plan memory 500MB --tokens 100B --bits 4 --json {options}")
        assert code == 0, error
        (row,) = json.loads(out)["plan"]["rows"]
        assert row["bytes"] <= 500e6
        assert row["plan"]["effective_bits"] == pytest.approx(8 * row["bytes"] / row["plan"]["params"])
        found[options] = row
    assert found["--format hf"]["plan"]["effective_bits"] == pytest.approx(16, rel=1e-3)
    assert found["--format gguf"]["plan"]["effective_bits"] == pytest.approx(4.5, rel=1e-2)  # Q4_0: 18 bytes for 32
    assert found[""]["plan"]["params"] > found["--format gguf"]["plan"]["params"]
