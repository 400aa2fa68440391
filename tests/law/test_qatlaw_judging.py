"""Judging a fit: bootstrap intervals, measured U-curves, held-out errors, and the file that keeps it all."""

import json
import runpy

import numpy as np
import pandas as pd
import pytest

from qatlaw import synthetic
from qatlaw.curves import READING, fraction_errors, measured_curves
from qatlaw.errors import InputError
from qatlaw.fit_file import fit_file, read_fit, write_fit
from qatlaw.fitting import fit
from qatlaw.fraction import closed_form
from qatlaw.laws import CHEN_2025, CHINCHILLA, KUMAR_2024, QAT_PER_BITS, QAT_UNIFIED
from qatlaw.summary import Summary, curve_rows
from qatlaw.table import RunTable
from qatlaw.uncertainty import bootstrap
from qatlaw.validation import compare, held_out


@pytest.fixture(scope="module")
def result():
    return fit(QAT_UNIFIED, synthetic.table(0))


@pytest.fixture(scope="module")
def drawn(result):
    return bootstrap(result, resamples=60)


# ---- bootstrap ---------------------------------------------------------------------------------------------------


def test_intervals_are_as_wide_as_the_noise_makes_them():
    """Against fits to fresh noise, which no resampling knows of: the Chinchilla part, 95 % of the exponents' spread."""
    full = synthetic.settings().query("scheme == 'fp'").reset_index(drop=True)
    exact = synthetic.law().loss(full["n_params"], full["tokens_fp"], 0, 16)
    found = []
    for seed in range(40):
        noise = np.exp(0.002 * np.random.default_rng(100 + seed).standard_normal(len(full)))
        found.append(fit(CHINCHILLA, RunTable.from_frame(full.assign(loss=exact * noise)), delta=1.0))
    widths = [bootstrap(one, resamples=100).coefficients["gamma"] for one in found[:5]]
    told = np.median([high - low for low, high in widths])
    assert told == pytest.approx(2 * 1.96 * np.std([one.law.coefficients["gamma"] for one in found]), rel=0.4)


def test_intervals_hold_the_fit_and_the_truth(result, drawn):
    cells = (4e8, 1e11, [1, 2, 4, 6])
    low, high = drawn.fraction(*cells)
    assert np.all((low < result.law.optimal_fraction(*cells)) & (result.law.optimal_fraction(*cells) < high))
    assert np.all(high - low < 0.15)
    run = (4e8, 7e10, 3e10, 4)
    low, high = drawn.loss(*run)
    assert low < result.law.loss(*run) < high
    # Seven repeats in all do not exclude that the trunk of a size errs as much as a run does.
    assert high - low < 2 * synthetic.NOISE * result.law.loss(*run)
    for name, (low, high) in drawn.coefficients.items():
        assert low < result.law.coefficients[name] < high, name


def test_the_seed_decides_the_intervals(result, drawn):
    np.testing.assert_array_equal(bootstrap(result, resamples=20).thetas, drawn.thetas[:20])
    assert not np.array_equal(bootstrap(result, resamples=20, seed=1).thetas, drawn.thetas[:20])


def test_bootstrap_refuses_what_makes_no_interval(result):
    with pytest.raises(InputError, match=r"^resamples = 5"):
        bootstrap(result, resamples=5)


# ---- measured U-curves -------------------------------------------------------------------------------------------


def test_a_curve_of_the_readings_form_is_read_exactly():
    f = np.array([0.05, 0.1, 0.3, 0.6, 0.9])
    (curve,) = measured_curves(curve_table(f, 3 - 0.02 * np.log(f) - 0.05 * np.log1p(-f)))
    assert curve.optimum == pytest.approx(0.02 / 0.07, abs=0.001)
    assert curve.inside
    assert curve.error == pytest.approx(READING, rel=1e-6)  # no noise is left
    assert curve.loss_at(f) == pytest.approx(curve.losses, rel=1e-12)
    assert (curve.N, curve.D_total, curve.B, curve.scheme) == (1e8, 1e10, 4.0, "fused")


def test_a_steep_left_side_does_not_move_the_minimum():
    """Losses as short phases on this project's ladder have them, f^-1.2: the two logarithms alone read .55 for .30."""
    f = np.array([0.02, 0.05, 0.15, 0.35, 0.65, 0.9])
    shape = lambda f: 3.9 + 0.0018 * f**-1.2 + 0.03 * f  # noqa: E731
    grid = np.linspace(0.02, 0.9, 2001)
    (curve,) = measured_curves(curve_table(f, shape(f)))
    assert curve.optimum == pytest.approx(grid[shape(grid).argmin()], abs=0.08)


def curve_table(f, loss, **columns):
    tokens = np.round(1e10 * np.asarray(f))
    base = {"n_params": 1e8, "bits": 4.0, "scheme": "fused", "tokens_qat": tokens, "tokens_fp": 1e10 - tokens}
    return RunTable.from_frame(pd.DataFrame({**base, "loss": loss, **columns}))


@pytest.mark.parametrize(("slope", "end"), [(0.1, 0.05), (-0.1, 0.9)])
def test_a_curve_without_a_minimum_inside_is_told(slope, end):
    f = np.array([0.05, 0.1, 0.3, 0.6, 0.9])
    (curve,) = measured_curves(curve_table(f, 3 + slope * np.log(f)))
    assert curve.optimum == end
    assert not curve.inside
    assert fraction_errors(synthetic.law().optimal_fraction, [curve]) == {}


def test_optima_of_noise_free_curves_are_the_laws_own():
    table = synthetic.table(0, noise=0.0)
    errors = fraction_errors(synthetic.law().optimal_fraction, measured_curves(table))
    assert set(errors) == {"all", "1", "2", "4", "6"}
    assert errors["all"].curves == 120
    assert errors["all"].mae < 0.015  # what the reading of a curve itself is off by


def test_error_bars_are_of_the_size_of_the_errors():
    """With the noise pooled from the curves' own scatter; 68 % within one standard error."""
    found = [
        fraction_errors(synthetic.law().optimal_fraction, measured_curves(synthetic.table(s, noise=5e-4)))["all"]
        for s in range(8)
    ]
    assert np.mean([errors.within for errors in found]) == pytest.approx(0.68, abs=0.12)
    known = measured_curves(synthetic.table(0, noise=5e-4), noise=5e-4)
    pooled = measured_curves(synthetic.table(0, noise=5e-4))
    assert np.mean([c.error for c in pooled]) == pytest.approx(np.mean([c.error for c in known]), rel=0.25)


def test_a_law_that_is_off_is_seen_in_the_fractions():
    curves = measured_curves(synthetic.table(0, noise=5e-4))
    off = synthetic.law().form.bind({**synthetic.COEFFICIENTS, "rho": 0.3})
    good, bad = (fraction_errors(law.optimal_fraction, curves)["all"] for law in (synthetic.law(), off))
    assert bad.mae > 2 * good.mae
    assert bad.bias > 0.1
    assert bad.within < 0.3 < good.within
    laws = {1.0: synthetic.law(), 4.0: off}
    own = [curve for curve in curves if curve.B in laws]
    by_width = fraction_errors(lambda N, D, B: laws[B].optimal_fraction(N, D, B), own)
    assert set(by_width) == {"all", "1", "4"}
    assert by_width["1"].mae < by_width["4"].mae


def test_the_closed_form_is_judged_by_the_same_curves():
    """Curves whose minimum is the closed form's by construction, and the same ones moved by 0.1."""
    f = np.linspace(0.05, 0.9, 9)
    published = closed_form(1e8, 1e10, 4.0)
    assert published == pytest.approx(np.exp(-6.7297 / np.log(1e10 / (1e8 * 4 / 8))))

    def curves(optimum):
        return measured_curves(curve_table(f, 3 - 0.1 * (optimum * np.log(f) + (1 - optimum) * np.log1p(-f))))

    assert fraction_errors(closed_form, curves(published))["all"].mae < 1e-3
    moved = fraction_errors(closed_form, curves(published + 0.1))["4"]
    assert moved.bias == pytest.approx(-0.1, abs=1e-3)


@pytest.fixture(scope="module")
def ladder():
    """What the script of the ladder's tables defines."""
    return runpy.run_path("analysis/studies/ladder-1to1000/tables.py")


@pytest.mark.parametrize("A", [2.0, 6.7297, 13.0])
def test_the_constant_of_curves_that_have_one_is_found(ladder, A):
    """Curves whose minima are exp(-A / ln S) by construction, at 30 to 3,000 tokens a byte."""
    f = np.linspace(0.02, 0.95, 12)
    curves = []
    for D in (1.5e9, 1e10, 1.5e11):
        best = np.exp(-A / np.log(D / (1e8 * 4 / 8)))
        loss = 3 - 0.1 * (best * np.log(f) + (1 - best) * np.log1p(-f))
        tokens = {"tokens_qat": np.round(D * f), "tokens_fp": D - np.round(D * f)}
        curves += measured_curves(curve_table(f, loss, **tokens))
    found = ladder["closed_form_constant"](curves)
    assert pytest.approx(A, rel=0.02) == found.A
    assert found.low <= found.A <= found.high
    assert found.worst < 1e-3
    above = curves[0].loss_at(0.5) - curves[0].loss_at(curves[0].optimum)
    assert ladder["regret"](curves[0], 0.5) == pytest.approx(above)


def test_where_the_longest_phases_are_best_the_constant_is_the_largest_that_costs_the_same(ladder):
    f = np.array([0.05, 0.1, 0.3, 0.6, 0.9])
    (curve,) = measured_curves(curve_table(f, 3 - 0.1 * np.log(f)))
    found = ladder["closed_form_constant"]([curve])
    assert ladder["regret"](curve, 0.95) == 0, "a fraction outside the runs costs what the nearest does"
    fraction = np.exp(-found.A / np.log(curve.S))
    assert 0.1 * np.log(0.9 / fraction) == pytest.approx(0.001, abs=2e-4)


def test_a_curve_with_too_few_tokens_per_byte_has_no_closed_form(result):
    f = np.array([0.05, 0.1, 0.3, 0.6, 0.9])
    (curve,) = measured_curves(curve_table(f, 3 - 0.02 * np.log(f) - 0.05 * np.log1p(-f), n_params=1e10, bits=8.0))
    assert curve.S == 1
    summary = Summary("qat_unified", None, "fused", result, None, {}, [curve])
    assert summary.closed_form == {}
    assert curve_rows(summary)[1][4:6] == ("0.29 ± 0.01", "–")


def test_ends_of_curves_and_lone_runs_are_no_curves():
    f = np.array([0.1, 0.5])
    assert measured_curves(curve_table(f, [3.0, 3.1])) == []
    three = curve_table([0.1, 0.3, 0.5], [3.1, 3.0, 3.1])
    (curve,) = measured_curves(three)
    assert np.isnan(curve.low)  # three runs, three unknowns: nothing is known of the noise
    assert np.isfinite(measured_curves(three, noise=0.002)[0].low)


# ---- held out ----------------------------------------------------------------------------------------------------


def test_the_true_form_predicts_the_largest_models_within_the_noise():
    table = synthetic.table(0)
    held = held_out(QAT_UNIFIED, table, "n_params")
    assert held.runs == 144
    assert held.sigma == pytest.approx(synthetic.NOISE, rel=0.3)
    assert held_out(QAT_UNIFIED, table, "tokens_total").sigma == pytest.approx(synthetic.NOISE, rel=0.3)


def test_what_was_held_out_was_not_seen():
    """Losses of the largest models changed at will: the fit without them is the same."""
    table = synthetic.table(0)
    spoiled = RunTable.from_frame(
        table.frame.assign(loss=table.loss * np.where(table.column("n_params") > 1e9, 1.2, 1))
    )
    bad = held_out(QAT_UNIFIED, spoiled, "n_params")
    unseen = spoiled.where((spoiled.column("n_params") > 1e9) & spoiled.quantized).loss
    assert bad.mae == pytest.approx((1 - 1 / 1.2) * unseen.mean(), rel=0.01)


def test_forms_are_ranked_by_what_they_were_not_fitted_on():
    rows = compare([CHEN_2025, KUMAR_2024, QAT_UNIFIED, CHINCHILLA], synthetic.table(0))
    assert rows[0].form is QAT_UNIFIED
    assert CHINCHILLA not in [row.form for row in rows]  # it predicts no quantized run
    assert all(row.in_sample.runs == 720 for row in rows)
    by_form = {row.form: row for row in rows}
    assert by_form[CHEN_2025].parameters == 4 * 8
    assert by_form[CHEN_2025].fractions is None
    assert by_form[QAT_UNIFIED].fractions.curves > 90
    assert all(set(row.held_out) == {"n_params", "tokens_total"} for row in rows)


def test_a_form_that_cannot_be_compared_says_why():
    table = synthetic.table(0).of_width(4)
    rows = compare([QAT_UNIFIED, QAT_PER_BITS], table)
    assert rows[0].form is QAT_PER_BITS
    assert rows[1].in_sample is None
    assert all("at least two" in reason for reason in rows[1].refused)


# ---- fit.json ----------------------------------------------------------------------------------------------------


def test_a_fit_survives_its_file(tmp_path, result, drawn):
    written = fit_file(result, drawn, note="x")
    write_fit(tmp_path / "fit.json", written)
    read = read_fit(tmp_path / "fit.json")
    assert read.law == result.law
    assert read.intervals == drawn.coefficients
    np.testing.assert_array_equal(read.bootstrap.thetas, drawn.thetas)
    assert read.range == result.table.ranges
    assert read.data.model_dump() == {
        "hash": result.table.hash, "runs": 757, "source": "synthetic runs, seed 0", "left_out": {}, "synthetic": True,
        "sizes": [86e6, 194e6, 396e6, 759e6, 2.2e9], "bits": "nominal",
    }  # fmt: skip
    assert read.quality["note"] == "x"
    assert read.quality["per_bits"]["4"]["runs"] == 180


def test_without_a_bootstrap_there_are_no_intervals(tmp_path, result):
    write_fit(tmp_path / "fit.json", fit_file(result, quality_of_nothing=float("nan")))
    read = read_fit(tmp_path / "fit.json")
    assert read.bootstrap is None
    assert read.intervals == {}
    assert read.quality["quality_of_nothing"] is None


def test_files_that_are_no_fit_are_refused(tmp_path, result):
    path = tmp_path / "fit.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_fit(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="object"):
        read_fit(path)
    write_fit(path, fit_file(result))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(InputError, match="format"):
        read_fit(path)
    path.write_text(json.dumps({**content, "coefficients": {**content["coefficients"], "xi": -1.0}}))
    with pytest.raises(InputError, match=r"coefficients\.xi"):
        read_fit(path)
    del content["data"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="data"):
        read_fit(path)
