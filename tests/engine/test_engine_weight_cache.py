"""When quantized weights are kept for all micro-batches of a step, and the bytes that are told."""

from __future__ import annotations

import pytest

from qatscale.config import load_ds_config, load_run_config
from qatscale.engine.layout import plan_layout
from qatscale.engine.weight_cache import keeps_weights, weight_cache_notices

QAT = ["qat.scheme=scratch", "qat.bits=2", "batch.sequences=8"]
ON, OFF = "engine.quantized_weight_cache=on", "engine.quantized_weight_cache=off"
RECOMPUTE = "engine.activation_checkpointing=true"


@pytest.mark.parametrize(
    ("ds_config", "overrides", "keeps"),
    [
        ("zero1_fp32", ["batch.micro_batch=4"], True),
        ("zero2_bf16", ["batch.micro_batch=4"], True),
        ("zero3_bf16", ["batch.micro_batch=4"], False),
        ("zero1_fp32", ["batch.micro_batch=8"], False),
        ("zero1_fp32", ["batch.micro_batch=4", RECOMPUTE], False),
        ("zero1_fp32", ["batch.micro_batch=8", RECOMPUTE, ON], True),
        ("zero1_fp32", ["batch.micro_batch=4", OFF], False),
        ("zero1_fp32", ["batch.micro_batch=4", ON, "qat.scheme=fp"], False),
    ],
)
def test_when_they_are_kept(ds_config: str, overrides: list[str], keeps: bool) -> None:
    config, ds = load_run_config("debug", [*QAT, *overrides]), load_ds_config(ds_config)
    layout = plan_layout(config, ds, 1)
    assert keeps_weights(config, ds, layout) is keeps
    assert bool(weight_cache_notices(config, ds, layout)) is keeps


def test_what_it_costs_is_told() -> None:
    """q, k, v, o: [64, 64]; gate, up, down: 64 x 192; the tied head: 512 x 64. In bf16 two bytes each."""
    sizes = ["model.hidden_size=64", "model.intermediate_size=192", "model.layers=3", "model.vocab_size=512"]
    ds = load_ds_config("zero1_bf16")
    config = load_run_config("debug", [*QAT, *sizes, "model.heads=4", RECOMPUTE, ON, "batch.micro_batch=2"])
    expected = 2 * (3 * (4 * 64 * 64 + 3 * 64 * 192) + 512 * 64)
    (notice,) = weight_cache_notices(config, ds, plan_layout(config, ds, 1))
    assert f"{expected / 1e6:,.1f} MB" in notice
    assert "4 micro-batches" in notice


def test_an_option_without_effect_is_told() -> None:
    config, ds = load_run_config("debug", [*QAT, ON, "batch.micro_batch=8"]), load_ds_config("zero1_fp32")
    assert "has no effect" in weight_cache_notices(config, ds, plan_layout(config, ds, 1))[0]
