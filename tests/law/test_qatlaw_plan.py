"""One run, every width, and wasted tokens: against the closed form, the law itself and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar

from qatlaw import InputError
from qatlaw.fit_file import fit_file, write_fit
from qatlaw.laws import CHEN_2025, QAT_PER_BITS
from qatlaw.plan.run import Recipe, compare_widths, judge_split, plan_run, switch_step, written_fraction
from qatlaw.plan.waste import fusion_saving, optimal_loss, split_loss, tokens_for_loss, wasted_tokens
from qatlaw.planner_law import PlannerLaw, load_law, synthetic_law

LAW = synthetic_law()
WIDTHS = (1, 1.58, 2, 3, 4, 5, 6)


def loss(N: float, D: float, f: float, B: float) -> float:
    return float(LAW.law.loss(N, (1 - f) * D, f * D, B))


def best(N: float, D: float, B: float) -> tuple[float, float]:
    """(f, L*) by an optimiser that knows nothing of the law's form."""
    found = minimize_scalar(lambda f: loss(N, D, f, B), bounds=(1e-4, 1 - 1e-4), method="bounded")
    return found.x, found.fun


class TestOneRun:
    @pytest.mark.parametrize(
        ("N", "D", "fractions"),
        [
            (86e6, 2.3e9, (0.285, 0.237, 0.184, 0.152)),
            (396e6, 100e9, (0.413, 0.378, 0.339, 0.315)),
            (2.2e9, 220e9, (0.365, 0.325, 0.281, 0.253)),
        ],
    )
    def test_without_a_law_the_closed_form_is_planned(self, N: float, D: float, fractions: tuple[float, ...]) -> None:
        for B, f in zip((1, 2, 4, 6), fractions, strict=True):
            plan = plan_run(Recipe(N, D), B)
            assert plan.fraction == plan.closed_form == pytest.approx(f, abs=5.001e-4)
            assert plan.prediction is None

    def test_every_token_is_in_one_phase(self) -> None:
        plan = plan_run(Recipe(396e6, 100e9), 4)
        assert plan.tokens_fp + plan.tokens_qat == plan.tokens == 100_000_000_000
        assert plan.tokens_qat == pytest.approx(plan.fraction * 100e9, abs=0.5)
        assert abs(plan.S - 505.05) < 0.005
        assert plan.warnings == ()
        assert plan.switch_step is None
        assert plan.overrides == ("tokens=100B", "qat.bits=4", "qat.scheme=sequential", "qat.fraction=0.33921")

    def test_the_switch_is_where_the_recipe_switches(self) -> None:
        plan = plan_run(Recipe(396e6, 100e9, tokens_per_step=2**20), 4)
        assert plan.steps == 95_367  # 100e9 / 2^20
        assert plan.switch_step == round((1 - plan.fraction) * 95_367)
        written = float(plan.overrides[-1].removeprefix("qat.fraction="))
        assert round((1 - written) * 95_367) == plan.switch_step

    def test_with_a_law_its_optimum_is_planned_and_told(self) -> None:
        plan = plan_run(Recipe(396e6, 100e9), 4, law=LAW)
        f, lowest = best(396e6, 100e9, 4)
        assert plan.fraction == pytest.approx(f, abs=1e-4)
        assert plan.prediction is not None
        assert plan.prediction.loss == pytest.approx(lowest, rel=1e-9)
        assert plan.prediction.rule.loss == pytest.approx(loss(396e6, 100e9, 0.1, 4), rel=1e-12)
        assert judge_split(LAW, 396e6, 100e9, 4, 0.25).loss == pytest.approx(loss(396e6, 100e9, 0.25, 4), rel=1e-12)
        assert plan.prediction.closed_form is not None
        assert plan.prediction.closed_form.fraction == pytest.approx(0.339, abs=5e-4)
        assert plan.prediction.full_precision_loss < plan.prediction.loss

    def test_outside_the_range_says_so(self) -> None:
        (warning,) = plan_run(Recipe(8e9, 100e9), 4).warnings
        assert "closed form" in warning
        assert "S = 25 " in warning
        (warning,) = plan_run(Recipe(8e9, 400e9), 4, law=LAW).warnings
        assert "loss law is extrapolated: N = 8B" in warning
        assert "S = " not in warning

    def test_fewer_tokens_than_bytes_need_a_law(self) -> None:
        with pytest.raises(InputError, match="S > 1"):
            plan_run(Recipe(1e9, 1e8), 8)
        plan = plan_run(Recipe(1e9, 1e8), 8, law=LAW)
        assert plan.closed_form is None
        assert plan.prediction is not None
        assert plan.prediction.closed_form is None
        assert "S = 0.1" in plan.warnings[0]

    @given(st.floats(1e-3, 0.999), st.integers(2, 10_000_000))
    def test_a_written_fraction_switches_at_the_same_step(self, fraction: float, steps: int) -> None:
        text = written_fraction(fraction, steps)
        assert switch_step(float(text), steps) == switch_step(fraction, steps)
        assert float(text) == pytest.approx(fraction, abs=1e-4)


class TestWasted:
    @pytest.mark.parametrize("B", [1, 2, 4, 6])
    @pytest.mark.parametrize("f", [0.02, 0.1, 0.7, 0.97])
    def test_against_a_search_that_knows_no_law(self, B: float, f: float) -> None:
        N, D = 396e6, 50e9
        reached = loss(N, D, f, B)
        enough = brentq(lambda x: best(N, math.exp(x), B)[1] - reached, math.log(D) - 8, math.log(D) + 0.01)
        assert wasted_tokens(LAW.law, N, D, f, B) == pytest.approx(1 - math.exp(enough) / D, abs=2e-6)

    @settings(max_examples=60)
    @given(st.floats(7, 11), st.floats(0.5, 4), st.sampled_from(WIDTHS), st.floats(0.001, 0.999))
    def test_never_below_zero_and_zero_only_at_the_optimum(self, n: float, ratio: float, B: float, f: float) -> None:
        N, D = 10**n, 10 ** (n + ratio)
        optimum = float(LAW.law.optimal_fraction(N, D, B))
        assert wasted_tokens(LAW.law, N, D, optimum, B) <= 1e-9
        wasted = float(wasted_tokens(LAW.law, N, D, f, B))
        assert 0 <= wasted < 1
        if abs(f - optimum) > 0.01:
            assert wasted > 1e-6
        assert optimal_loss(LAW.law, N, (1 - wasted) * D, B) == pytest.approx(loss(N, D, f, B), rel=1e-11)

    def test_arrays_broadcast(self) -> None:
        N, f = np.array([[86e6], [759e6]]), np.array([0.1, 0.3, 0.6])
        wasted = wasted_tokens(LAW.law, N, 100e9, f, 4)
        assert wasted.shape == (2, 3)
        assert wasted[1, 2] == pytest.approx(float(wasted_tokens(LAW.law, 759e6, 100e9, 0.6, 4)), abs=1e-12)

    def test_tokens_for_a_loss_are_the_inverse_and_infinite_below_reach(self) -> None:
        D = np.array([1e9, 1e10, 1e12])
        goals = optimal_loss(LAW.law, 396e6, D, 4)
        np.testing.assert_allclose(tokens_for_loss(LAW.law, 396e6, goals, 4, near=3e10), D, rtol=1e-9)
        # Beyond all tokens the base keeps alpha + zeta / N^eta and the quantization theta 2^(-kappa B).
        c = LAW.law.coefficients
        floor = c["alpha"] + c["zeta"] / 396e6 ** c["eta"] + c["theta"] * 2 ** (-c["kappa"] * 4)
        assert tokens_for_loss(LAW.law, 396e6, floor - 1e-6, 4, near=1e10) == math.inf

    @pytest.mark.parametrize("f", [0.0, 1.0, -0.1, math.nan])
    def test_the_ends_are_no_split(self, f: float) -> None:
        with pytest.raises(InputError, match="between 0 and 1"):
            wasted_tokens(LAW.law, 396e6, 1e10, f, 4)

    def test_fusion_by_its_definition(self) -> None:
        D_u = 112e9
        gain = float(optimal_loss(LAW.law, 396e6, D_u, 4) - optimal_loss(LAW.law, 396e6, 100e9, 4))
        found = fusion_saving(LAW.law, 396e6, 100e9, 4, fused_loss=2.4 + gain, sequential_loss=2.4)
        assert found.sequential_tokens == pytest.approx(D_u, rel=1e-9)
        assert found.saved == pytest.approx(1 - 100 / 112, rel=1e-8)
        assert fusion_saving(LAW.law, 396e6, 100e9, 4, 2.41, 2.4).saved < 0
        with pytest.raises(InputError, match="no number of tokens"):
            fusion_saving(LAW.law, 396e6, 100e9, 4, 1.0, 2.4)


class TestWidths:
    def test_gaps_are_of_the_law_and_fall_with_bits(self) -> None:
        found = compare_widths(Recipe(759e6, 100e9), WIDTHS, law=LAW, tolerance=0.04)
        gaps = [row.gap for row in found.rows]
        for row in found.rows:
            expected = best(759e6, 100e9, row.bits)[1] - float(LAW.law.loss(759e6, 100e9, 0, row.bits))
            assert row.gap == pytest.approx(expected, abs=1e-8)
        assert gaps == sorted(gaps, reverse=True)
        assert found.smallest is not None
        within = [row.bits for row in found.rows if row.gap is not None and row.gap <= 0.04]
        assert found.rows[found.smallest].bits == min(within)
        assert compare_widths(Recipe(759e6, 100e9), WIDTHS, law=LAW, tolerance=1e-9).smallest is None

    def test_without_a_law_there_are_only_fractions(self) -> None:
        found = compare_widths(Recipe(759e6, 150e9), (1, 2, 4, 6))
        assert [round(row.plan.fraction, 3) for row in found.rows] == [0.401, 0.365, 0.325, 0.299]
        assert {row.gap for row in found.rows} == {None}
        assert found.smallest is None
        assert found.full_precision_loss is None


class TestTheLaw:
    def test_a_fit_file_is_read_with_its_range(self, tmp_path) -> None:
        from qatlaw.fitting import fit
        from qatlaw.synthetic import table

        path = tmp_path / "fit.json"
        write_fit(path, fit_file(fit(QAT_PER_BITS, table(0).of_width(4.0), starts=4)))
        law = load_law(str(path))
        assert law.synthetic, "its runs were made up"
        assert law.law.form is QAT_PER_BITS
        assert "runs of synthetic runs" in law.source
        assert plan_run(Recipe(396e6, 100e9), 4, law=law).fraction == pytest.approx(best(396e6, 100e9, 4)[0], abs=0.05)
        with pytest.raises(InputError, match=r"--bits = 2: .* 4 bits alone"):
            plan_run(Recipe(396e6, 100e9), 2, law=law)

    def test_a_law_without_a_split_plans_nothing(self, tmp_path) -> None:
        from qatlaw.fitting import fit
        from qatlaw.synthetic import table

        path = tmp_path / "fit.json"
        write_fit(path, fit_file(fit(CHEN_2025, table(0).of_width(4.0), starts=4)))
        with pytest.raises(InputError, match="plans no switch"):
            load_law(str(path))

    def test_a_missing_file_names_the_option(self) -> None:
        with pytest.raises(InputError, match=r"^--law = 'nowhere.json'"):
            load_law("nowhere.json")

    def test_the_synthetic_law_says_what_it_is(self) -> None:
        assert LAW.synthetic
        assert "fitted on no runs" in LAW.source

    def test_intervals_come_from_the_resampled_laws(self) -> None:
        from qatlaw.fit_file import Bootstrap

        thetas = np.array([LAW.law.theta] * 40)
        names = LAW.law.form.names
        thetas[:, names.index("rho")] *= np.linspace(0.5, 1.5, 40)
        law = PlannerLaw(LAW.law, "test", LAW.range, bootstrap=Bootstrap(LAW.law.form, thetas, 0.9))
        found = plan_run(Recipe(396e6, 100e9), 4, law=law).prediction
        assert found is not None
        assert found.fraction_interval is not None
        assert found.level == 0.9
        ends = [float(LAW.law.form.optimal_fraction(thetas[i], 396e6, 100e9, 4)) for i in (0, 39)]
        low, high = found.fraction_interval
        assert ends[0] < low < plan_run(Recipe(396e6, 100e9), 4, law=law).fraction < high < ends[1]

    def test_importing_the_planner_brings_numpy_alone(self) -> None:
        import subprocess
        import sys

        code = (
            "import sys, qatlaw.plan, qatlaw.cli, qatlaw.planner_law as d; d.load_law('synthetic');"
            "print(sorted({'torch', 'scipy', 'pandas', 'matplotlib', 'qatscale'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_the_split_loss_is_the_law_at_both_phases() -> None:
    assert split_loss(LAW.law, 396e6, 100e9, 0.25, 4) == LAW.law.loss(396e6, 75e9, 25e9, 4)
