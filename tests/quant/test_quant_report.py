"""The report of a switch counts what was quantized."""

from __future__ import annotations

import json

import pytest
import torch

from qatscale.quant.fake_quantize import fake_quantize
from tests.quant.quant_models import prepared


def test_the_report_counts_what_was_quantized() -> None:
    model, plugin, _, masters = prepared(0, bits=2)
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    blocks, embed = 2 * (4 * 32 * 32 + 3 * 32 * 48), 40 * 32
    scales = 2 * (4 * 32 + 2 * 48 + 32)
    stored = 2 * blocks + 32 * scales + 4 * embed + 32 * 40  # fp32 scales
    assert report.layers == 16
    assert len(report.modules) == 15, "a tied embedding and head are one matrix"
    assert report.weights == blocks + embed
    assert report.bits_per_weight == pytest.approx(stored / (blocks + embed), rel=1e-15)
    assert report.bytes == stored // 8
    first = report.modules[0].to_dict()
    assert first["names"] == ["embed", "head"]
    assert (first["bits"], first["quantizer"], first["shape"], first["scales"]) == (4, "lsq", [40, 32], 40)
    assert first["bits_per_weight"] == 4 + 32 * 40 / (40 * 32)

    up = model.blocks[1].mlp.up
    error = up.weight - fake_quantize(up.quantizer, up.weight, up.weight_scale)
    found = {name: m.relative_error for m in report.modules for name in m.names}["blocks.1.mlp.up"]
    assert found == pytest.approx((error.norm() / up.weight.norm()).item(), rel=1e-6)
    squares = [(m.squared_error, m.squared_norm) for m in report.modules]
    assert report.relative_error == pytest.approx((sum(e for e, _ in squares) / sum(n for _, n in squares)) ** 0.5)

    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again == report.to_dict()
    text = str(report)
    for expected in ("16 layers", "embed = head", "seq", "lsq", "gate", f"{blocks + embed:,}"):
        assert expected in text, text


def test_ternary_is_stored_in_two_bits_and_zero_weights_are_reported() -> None:
    model, plugin, _, masters = prepared(0, tied=False, bits=1.58)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.zero_()
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    down = {name: m for m in report.modules for name in m.names}["blocks.0.mlp.down"]
    assert down.bits_per_weight == 2 + 32 * 32 / (32 * 48)
    assert down.relative_error == 0
    assert "In full precision: embed, head." in " ".join(str(report).split())

    model, plugin, _, masters = prepared(0, tied=False, bits=1)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.zero_()  # becomes +1e-5 everywhere
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    json.dumps(report.to_dict(), allow_nan=False)
    assert {n: m.to_dict() for m in report.modules for n in m.names}["blocks.0.mlp.down"]["relative_error"] is None
