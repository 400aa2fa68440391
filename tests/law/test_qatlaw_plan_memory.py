"""A memory budget: the shapes against qatscale's own arithmetic, the choice against trying every shape."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlaw import InputError
from qatlaw.bit_widths import BIT_WIDTHS
from qatlaw.plan.memory import plan_memory
from qatlaw.plan.shapes import Shape, shapes_within
from qatlaw.planner_law import synthetic_law
from qatscale.config.recipe import load_run_config
from qatscale.config.schema import ModelConfig, QatConfig
from qatscale.config.sizes import count_parameters, stored_weights

LAW = synthetic_law()


def largest_shape(budget: float, bits: float) -> Shape:
    return shapes_within(budget, bits)[-1]


def model_of(shape: Shape) -> ModelConfig:
    config = load_run_config("396m", shape.overrides)
    return config.model


@pytest.mark.parametrize("shape", [Shape(256, 3, 32_000), Shape(1792, 24, 32_000), Shape(4096, 50, 128_256)])
def test_a_shape_has_the_parameters_of_the_model_it_overrides(shape: Shape) -> None:
    model = model_of(shape)
    assert (model.hidden_size, model.layers, model.vocab_size) == (shape.hidden_size, shape.layers, shape.vocabulary)
    assert count_parameters(model) == shape.params


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_shape_takes_the_bytes_of_its_quantized_layers(bits: int) -> None:
    """Counted layer by layer from a real model: every quantized matrix, its scales, and the norms."""
    import torch

    from qatscale.model.llama import Llama
    from qatscale.quant.selection import select

    shape = Shape(128, 2, 1000)
    with torch.device("meta"):
        model = Llama(model_of(shape))
    total, matrices = 0.0, set()
    for target in select(model, QatConfig(scheme="fused", bits=bits)).targets:
        if id(target.module.weight) in matrices:  # the head is the embedding
            continue
        matrices.add(id(target.module.weight))
        rows, columns = target.module.weight.shape
        total += rows * columns * target.rule.at(bits) / 8 + rows * 2
    total += sum(p.numel() * 2 for p in model.parameters() if id(p) not in matrices)
    assert shape.weights(bits).bytes == total


def test_the_overhead_by_hand() -> None:
    # width 128, MLP 384 (2.7 x 128 = 345.6, to the nearest 128), 2 layers, 1000 pieces, 2 bits
    blocks = 2 * (4 * 128 * 128 + 3 * 128 * 384)
    scales = 2 * (4 * 128 + 2 * 384 + 128) + 1000
    norms = 5 * 128
    assert Shape(128, 2, 1000).weights(2).bytes == (blocks * 2 + 1000 * 128 * 4 + 16 * (scales + norms)) / 8
    assert Shape(128, 2, 1000).params == blocks + 1000 * 128 + norms


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("budget", [5e6, 60e6, 500e6])
def test_the_largest_shape_is_the_largest(budget: float, bits: float) -> None:
    found = largest_shape(budget, bits)
    assert found.weights(bits).bytes <= budget
    usual = [
        Shape(width, layers, 32_000)
        for width in range(128, 5000, 128)
        for layers in range(1, 90)
        if 56 <= width / layers <= 100
    ]
    assert max(s.params for s in usual if s.weights(bits).bytes <= budget) == found.params


@pytest.mark.parametrize(("recipe", "bits"), [("194m", 4), ("396m", 2), ("759m", 4), ("2p2b", 4)])
def test_the_rule_is_near_the_recipes(recipe: str, bits: float) -> None:
    """The budget that a recipe's own model takes holds a model of about its size."""
    model = load_run_config(recipe).model
    stored, table = stored_weights(model, QatConfig()), model.vocab_size * model.hidden_size
    budget = ((stored.params - table) * bits + table * max(4, bits)) / 8
    assert largest_shape(budget * 1.01, bits).params == pytest.approx(stored.params, rel=0.06)


@settings(max_examples=40)
@given(st.floats(6.8, 10.5), st.floats(0.001, 1), st.sampled_from(BIT_WIDTHS))
def test_more_memory_never_means_a_smaller_model_or_a_higher_loss(log: float, more: float, bits: float) -> None:
    small, large = largest_shape(10**log, bits), largest_shape(10 ** (log + more), bits)
    assert small.params <= large.params
    losses = [plan_memory(10**x, 100e9, (bits,), law=LAW).rows[0].plan.prediction for x in (log, log + more)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0].loss >= losses[1].loss


def test_a_smaller_model_than_fits_where_tokens_are_too_few_for_it() -> None:
    """In the law QAT's error rises with N at fixed tokens: there is a best N, and it is not the largest that fits."""
    (row,) = plan_memory(20e9, 10e9, (1,), law=LAW).rows
    assert row.shape.params < row.largest.params
    assert row.plan.prediction is not None
    for shape in (row.largest, *shapes_within(20e9, 1)[::97]):
        f = float(LAW.law.optimal_fraction(shape.params, 10e9, 1))
        assert row.plan.prediction.loss <= float(LAW.law.loss(shape.params, (1 - f) * 10e9, f * 10e9, 1))
    assert plan_memory(20e9, 100e9, (1,)).rows[0].shape == row.largest, "without a law the largest"


def test_the_best_width_is_the_one_with_the_lowest_loss() -> None:
    plan = plan_memory(500e6, 100e9, BIT_WIDTHS, law=LAW)
    losses = {}
    for bits in BIT_WIDTHS:
        N = largest_shape(500e6, bits).params  # at so many tokens the largest is the best at every width
        f = float(LAW.law.optimal_fraction(N, 100e9, bits))
        losses[bits] = float(LAW.law.loss(N, (1 - f) * 100e9, f * 100e9, bits))
    assert plan.best is not None
    assert plan.rows[plan.best].bits == min(losses, key=lambda bits: losses[bits])
    assert {row.flops for row in plan.rows} == {6.0 * row.plan.params * 100e9 for row in plan.rows}


def test_without_a_law_widths_are_not_ranked() -> None:
    assert plan_memory(500e6, 100e9, BIT_WIDTHS).best is None
    assert plan_memory(500e6, 100e9, (4,)).best == 0, "there is nothing to choose"


@pytest.mark.parametrize(("budget", "shown"), [(1e6, "1MB"), (2e13, "20TB")])
def test_a_budget_no_model_fits_is_refused(budget: float, shown: str) -> None:
    with pytest.raises(InputError, match=rf"BYTES = '{shown}': .* take \d[\d.]*MB to \d[\d.]*TB at 4 bits"):
        largest_shape(budget, 4)
