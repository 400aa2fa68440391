"""Compute budgets and checkpoints: against brute force, the stationarity condition, and each other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlaw import InputError, optimal_fraction
from qatlaw.fraction_laws import PAPER
from qatlaw.plan.budget import Budget, best_size, compute_optimal, plan_budget, spend
from qatlaw.plan.checkpoint import plan_checkpoint
from qatlaw.planner_law import synthetic_law

LAW = synthetic_law()


def budget(overhead: float, N: float = 396e6, amount: float = 1e21) -> Budget:
    return Budget(amount, "FLOPs", 6 * N, 6 * N * overhead)


class TestComputeOptimal:
    @settings(max_examples=40)
    @given(st.floats(7.5, 10.5), st.floats(19.5, 23), st.sampled_from([1, 2, 4, 6]))
    def test_equal_costs_give_the_token_optimum(self, n: float, c: float, B: float) -> None:
        N, amount = 10**n, 10**c
        f, D = compute_optimal(LAW.law, N, B, amount, 6 * N, 6 * N)
        np.testing.assert_allclose(D, amount / (6 * N), rtol=1e-12)
        assert f == pytest.approx(float(LAW.law.optimal_fraction(N, D, B)), abs=2e-6)

    @settings(max_examples=40)
    @given(st.floats(1.01, 4), st.floats(19.5, 23), st.sampled_from([1, 2, 4, 6]))
    def test_dearer_qat_gets_fewer_tokens(self, overhead: float, c: float, B: float) -> None:
        N, amount = 396e6, 10**c
        f, D = compute_optimal(LAW.law, N, B, amount, 6 * N, 6 * N * overhead)
        assert f < float(LAW.law.optimal_fraction(N, D, B))
        assert D * ((1 - f) + overhead * f) * 6 * N == pytest.approx(amount, rel=1e-12)
        # At the optimum the last unit spent on either phase gains the same: dL/dD_fp / c_fp = dL/dD_qat / c_qat.
        D_fp, D_qat, h = (1 - f) * D, f * D, 1e-4
        by_fp = LAW.law.loss(N, D_fp * (1 + h), D_qat, B) - LAW.law.loss(N, D_fp * (1 - h), D_qat, B)
        by_qat = LAW.law.loss(N, D_fp, D_qat * (1 + h), B) - LAW.law.loss(N, D_fp, D_qat * (1 - h), B)
        assert by_fp / D_fp == pytest.approx(by_qat / D_qat / overhead, rel=1e-3)

    @pytest.mark.parametrize("overhead", [0.8, 1.0, 1.3, 3.0])
    @pytest.mark.parametrize("B", [1, 4])
    def test_a_grid_finds_nothing_better(self, overhead: float, B: float) -> None:
        plan = plan_budget(396e6, B, budget(overhead), law=LAW)
        f = np.linspace(1e-4, 1 - 1e-4, 200_001)
        D = 1e21 / (6 * 396e6 * (1 - f + overhead * f))
        losses = LAW.law.loss(396e6, (1 - f) * D, f * D, B)
        found = plan.compute_optimal
        assert found is not None
        assert found.loss is not None
        assert found.loss <= losses.min() + 1e-12
        assert found.fraction == pytest.approx(f[losses.argmin()], abs=1e-5)
        assert plan.token_optimal is not None
        assert plan.token_optimal.loss is not None
        assert found.loss <= plan.token_optimal.loss

    def test_arrays_broadcast(self) -> None:
        N, B = np.array([[86e6], [396e6]]), np.array([1, 4, 6])
        f, D = compute_optimal(LAW.law, N, B, 1e21, 6 * N, 7 * N)
        assert f.shape == D.shape == (2, 3)
        assert f[1, 1] == compute_optimal(LAW.law, 396e6, 4, 1e21, 6 * 396e6, 7 * 396e6)[0]

    def test_a_rule_spends_the_whole_budget(self) -> None:
        one = budget(1.7)
        f, D = spend(one, lambda _: 0.25)
        assert f == 0.25
        assert D * (0.75 * one.fp_cost + 0.25 * one.qat_cost) == pytest.approx(1e21, rel=1e-12)

    @pytest.mark.parametrize("overhead", [1.0, 1.4])
    def test_the_best_size_is_the_best_of_many(self, overhead: float) -> None:
        N = best_size(LAW.law, 4, 1e21, 6, 6 * overhead)
        sizes = N * np.exp(np.linspace(-1.5, 1.5, 601))
        f, D = compute_optimal(LAW.law, sizes, 4, 1e21, 6 * sizes, 6 * sizes * overhead)
        losses = LAW.law.loss(sizes, (1 - f) * D, f * D, 4)
        assert sizes[losses.argmin()] == pytest.approx(N, rel=0.006)
        plan = plan_budget(None, 4, Budget(1e21, "FLOPs", 6, 6 * overhead), law=LAW)
        assert plan.params == round(N)
        assert plan.chosen.loss == pytest.approx(losses.min(), abs=1e-7)

    def test_without_a_law_the_closed_form_spends_it(self) -> None:
        plan = plan_budget(396e6, 4, budget(1.0))
        assert plan.compute_optimal is plan.token_optimal is None
        assert plan.closed_form is not None
        assert plan.chosen == replace(plan.closed_form, name="planned")
        assert plan.chosen.tokens == pytest.approx(1e21 / (6 * 396e6), rel=1e-12)
        assert plan.chosen.fraction == pytest.approx(optimal_fraction(396e6, plan.chosen.tokens, 4), rel=1e-12)
        assert plan.chosen.loss is None
        with pytest.raises(InputError, match="more than 1"):
            plan_budget(396e9, 4, budget(1.0, N=396e9))

    @pytest.mark.parametrize("amount", [0.0, -1.0, math.inf, math.nan])
    def test_no_budget_is_refused(self, amount: float) -> None:
        with pytest.raises(InputError, match="positive finite"):
            budget(1.0, amount=amount)


class TestCheckpoint:
    @settings(max_examples=40)
    @given(st.floats(7.5, 10.5), st.floats(0.8, 4), st.sampled_from([1, 2, 4, 6]), st.booleans())
    def test_what_it_deserves_makes_it_the_optimal_share(self, n: float, ratio: float, B: float, fitted: bool) -> None:
        N, D_fp = 10**n, round(10 ** (n + ratio))
        plan = plan_checkpoint(N, B, D_fp, law=LAW if fitted else PAPER)
        assert plan.tokens == plan.tokens_fp + plan.tokens_qat
        expected = (LAW.law.optimal_fraction if fitted else optimal_fraction)(N, plan.tokens, B)
        assert plan.fraction == pytest.approx(float(expected), abs=1e-6)

    def test_what_further_tokens_buy(self) -> None:
        plan = plan_checkpoint(396e6, 4, 60e9, law=LAW)
        losses = [purchase.loss for purchase in plan.purchases]
        assert losses == sorted(losses, reverse=True), "each further token lowers the loss"
        for purchase in plan.purchases:
            q = purchase.tokens_qat
            ends = [float(LAW.law.loss(396e6, 60e9, q + d, 4)) for d in (-1e6, 1e6)]
            assert purchase.slope == pytest.approx((ends[1] - ends[0]) / 2e6 * 1e9, rel=1e-4)
            assert purchase.fraction == pytest.approx(q / (60e9 + q), rel=1e-9)
        slopes = [purchase.slope for purchase in plan.purchases]
        assert slopes == sorted(slopes), "and less than the one before"
        assert plan.loss == next(p.loss for p in plan.purchases if p.multiple == 1)

    def test_whole_steps(self) -> None:
        plan = plan_checkpoint(396e6, 4, 2**20 * 1000).whole_steps(2**20)
        assert plan.tokens % 2**20 == 0
        tokens, _, fraction = plan.overrides(2**20)
        steps = int(tokens.removeprefix("tokens=")) // 2**20
        assert round((1 - float(fraction.removeprefix("qat.fraction="))) * steps) == 1000
        assert plan_checkpoint(396e6, 1, 4e8).whole_steps(10**12).tokens_qat == 10**12, "one step at least"

    def test_without_a_law_nothing_is_predicted(self) -> None:
        plan = plan_checkpoint(396e6, 4, 60e9)
        assert {p.loss for p in plan.purchases} == {p.slope for p in plan.purchases} == {None}
        assert plan.loss is plan.full_precision_loss is None

    def test_fewer_tokens_than_bytes_are_refused(self) -> None:
        with pytest.raises(InputError, match="less than a token per byte"):
            plan_checkpoint(1e12, 4, 1e9)
