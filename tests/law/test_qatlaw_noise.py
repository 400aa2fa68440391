"""Runs that share a trunk share noise: what is estimated of it, and whether intervals hold the truth all the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from interval_coverage import BITS, SIZES, TOKENS, grid

from qatlaw import synthetic
from qatlaw.fit_file import fit_file, read_fit, write_fit
from qatlaw.fitting import fit
from qatlaw.laws import QAT_UNIFIED
from qatlaw.noise import estimate_noise, own_errors
from qatlaw.planner_law import load_law
from qatlaw.table import RunTable
from qatlaw.uncertainty import bootstrap, interval_notes

CELLS = [axis.ravel() for axis in np.meshgrid(SIZES, TOKENS, BITS)]


def ladder(seeds: int, trunk_noise: float, draw: int) -> RunTable:
    """Runs of the synthetic law on a study's grid: `trunk_noise` in units of a run's own, one error a size and seed."""
    return grid(draw, seeds, trunk_noise, SIZES)


def covered(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("trunk_noise", [0.5, *(pytest.param(noise, marks=pytest.mark.slow) for noise in (0.0, 2.0))])
def test_intervals_hold_the_truth(trunk_noise: float) -> None:
    """Nominal 95 %; the record with more draws, seeds and resamples is analysis/benchmarks/interval_coverage.md."""
    law = synthetic.law()
    fractions, losses = [], []
    for seeds, draw in [(seeds, draw) for seeds in (1, 2) for draw in range(12)]:
        result = fit(QAT_UNIFIED, ladder(seeds, trunk_noise, draw), starts=2)
        drawn = bootstrap(result, resamples=50)
        fractions.append(covered(*drawn.fraction(*CELLS), law.optimal_fraction(*CELLS)))
        table = result.table
        runs = [table.column(name) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")]
        if seeds > 1:
            losses.append(covered(*drawn.loss(*runs), law.loss(*runs)))
        else:
            assert np.isnan(drawn.loss(*runs)).all()
    assert np.mean(fractions) >= 0.9
    assert np.mean(losses) >= 0.9


def test_one_seed_a_size_gives_no_interval_of_the_loss_and_says_so(tmp_path) -> None:
    result = fit(QAT_UNIFIED, ladder(1, 1.0, 0))
    drawn = bootstrap(result, resamples=20)
    assert not {"alpha", "zeta", "eta"} & set(drawn.coefficients)
    assert {"beta", "gamma", "phi", "lambda", "xi", "rho"} <= set(drawn.coefficients)
    (told,) = interval_notes(result)
    assert "No interval of the loss" in told
    assert "one seed a size" in told
    assert "More seeds" in told
    write_fit(tmp_path / "fit.json", fit_file(result, drawn))
    read = read_fit(tmp_path / "fit.json").bootstrap
    assert read is not None
    assert np.isnan(read.loss(SIZES[0], 1e9, 1e9, 2.0)).all()
    assert read.unknown == drawn.unknown
    assert read.coefficients == drawn.coefficients
    assert np.isfinite(read.fraction(SIZES[0], 2e9, 2.0)).all()
    more = fit(QAT_UNIFIED, ladder(2, 1.0, 0))
    assert interval_notes(more) == []
    assert bootstrap(more, resamples=20).loss_sizes == SIZES


def test_two_sizes_say_nothing_of_losses_at_a_third(tmp_path) -> None:
    """Their fractions are determined; alpha, zeta and eta are two numbers between them."""
    result = fit(QAT_UNIFIED, ladder(2, 0.5, 1))
    assert any("alpha, zeta and eta separately" in warning for warning in result.warnings)
    drawn = bootstrap(result, resamples=20)
    low, high = drawn.loss([SIZES[0], 120e6, SIZES[1]], 1e9, 1e9, 2.0)
    assert np.isfinite(low).tolist() == np.isfinite(high).tolist() == [True, False, True]
    write_fit(tmp_path / "fit.json", fit_file(result, drawn))
    planner = load_law(str(tmp_path / "fit.json"))
    assert "two sizes" in (planner.warning(120e6, 5e9, 2.0) or "")
    assert planner.warning(SIZES[0], 5e9, 2.0) is None


def test_a_table_without_seeds_says_what_is_assumed() -> None:
    table = ladder(1, 0.0, 0)
    without = RunTable.from_frame(table.frame.drop(columns="seed"))
    assert len(np.unique(without.trunks)) == len(SIZES)
    assumed, unknown = interval_notes(fit(QAT_UNIFIED, without))
    assert "no column seed" in assumed
    assert "No interval of the loss" in unknown


def test_runs_that_share_no_trunk_have_their_own_noise_alone() -> None:
    """A seed of its own for every run: nothing is shared, and the loss has its interval."""
    table = synthetic.table(0)
    alone = RunTable.from_frame(table.frame.assign(seed=range(len(table))))
    result = fit(QAT_UNIFIED, alone)
    assert result.noise.trunk == 0
    assert result.noise.own == pytest.approx(synthetic.NOISE, rel=0.1)
    drawn = bootstrap(result, resamples=60)
    low, high = drawn.loss(4e8, 7e10, 3e10, 4)
    loss = result.law.loss(4e8, 7e10, 3e10, 4)
    assert low < loss < high
    assert high - low < synthetic.NOISE * loss, "of a law fitted to 757 runs, not of one run"


def test_the_noise_of_runs_and_trunks_is_told_apart() -> None:
    """Estimates over 200 draws of 8 trunks of 20 runs: their means are the truth, within 4 standard errors."""
    trunks, sizes = np.repeat(np.arange(8), 20), np.repeat([1.0, 2.0], 80)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        errors = rng.standard_normal(160) + 1.5 * rng.standard_normal(8)[trunks]
        found.append(estimate_noise(errors, trunks, sizes, parameters=0))
    own, trunk = (np.array([getattr(one, name) ** 2 for one in found]) for name in ("own", "trunk"))
    assert abs(own.mean() - 1) < 4 * own.std() / 200**0.5 + 0.01  # outliers are held at 4 deviations
    assert abs(trunk.mean() - 1.5**2) < 4 * trunk.std() / 200**0.5
    assert {one.freedom for one in found} == {6}
    assert found[0].shared == pytest.approx(20)
    drawn = np.array([found[0].draw(rng) ** 2 for _ in range(4000)])
    # Of 6 degrees of freedom: 6 / chi-square has the mean 6 / 4.
    expected = (found[0].between * 6 / 4 - found[0].own ** 2) / 20
    assert drawn.mean() == pytest.approx(expected, rel=0.1)


def test_what_a_trunk_shares_is_taken_out_of_its_runs() -> None:
    """Against the conditional mean of the normal distribution."""
    trunks = np.array([0, 0, 0, 1, 1])
    errors = np.array([1.0, 2.0, 0.5, -1.0, -0.2])
    noise = replace(estimate_noise(errors, trunks, np.zeros(5), 0), own=1.0, trunk=1.3, freedom=5)
    covariance = 1.3**2 * (trunks[:, None] == trunks[None, :])
    expected = errors - covariance @ np.linalg.solve(np.eye(5) + covariance, errors)
    np.testing.assert_allclose(own_errors(errors, trunks, noise), expected, rtol=1e-12)


def test_seeds_at_some_cells_do_not_mislead_the_fractions() -> None:
    """Five seeds at two cells, as one measures noise, beside one seed everywhere: their trunks err apart from it."""
    truth = synthetic.law().optimal_fraction(*CELLS)
    gaps, ratios = [], []
    for draw in range(10):
        frame = ladder(5, 2.0, draw).frame
        total = frame["tokens_fp"] + frame["tokens_qat"]
        frame = frame[(frame["seed"] == 0) | (frame["bits"] == 2) & (total.round() == TOKENS[0])]
        aware, unaware = (
            fit(QAT_UNIFIED, RunTable.from_frame(one)) for one in (frame, frame.assign(seed=range(len(frame))))
        )
        assert aware.noise.freedom == 8
        ratios.append(aware.noise.ratio)
        gaps.append([np.abs(one.law.optimal_fraction(*CELLS) - truth).mean() for one in (aware, unaware)])
    assert np.median(ratios) == pytest.approx(2.0, rel=0.25)
    assert np.mean(gaps, axis=0)[0] < 0.9 * np.mean(gaps, axis=0)[1]
