"""The information of runs against a linear model and against the scatter of real fits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qatlaw import synthetic
from qatlaw.fit import fit
from qatlaw.information import Certainty, Runs, information
from qatlaw.laws import CHINCHILLA
from qatlaw.table import RunTable


def runs_of(table: RunTable) -> Runs:
    return Runs(*(table.column(name) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")))


def test_information_of_a_linear_law_is_that_of_least_squares() -> None:
    """With only alpha to move, ln L has slope alpha / L in ln alpha, and n runs know it to s / sqrt(sum slope^2)."""
    law = synthetic.law()
    runs = runs_of(synthetic.table(0))
    slopes = law.theta[0] / law.loss(runs.N, runs.D_fp, runs.D_qat, runs.B)
    assert information(law, runs, 0.002)[0, 0] == pytest.approx(np.sum(slopes**2) / 0.002**2)


def test_twice_the_runs_are_worth_a_root_of_two_and_half_the_noise_two() -> None:
    law, runs = synthetic.law(), runs_of(synthetic.table(0))
    once = Certainty.of(law, information(law, runs, 0.002))
    twice = Certainty.of(law, information(law, runs + runs, 0.002))
    quiet = Certainty.of(law, information(law, runs, 0.001))
    for name, error in once.parameters.items():
        assert twice.parameters[name] == pytest.approx(error / math.sqrt(2), rel=1e-5)
        assert quiet.parameters[name] == pytest.approx(error / 2, rel=1e-5)
    cell = (396e6, 100e9, 4.0)
    assert twice.fraction(*cell) == pytest.approx(once.fraction(*cell) / math.sqrt(2), rel=1e-4)


def test_the_predicted_errors_are_those_of_real_fits() -> None:
    """Chinchilla's law fitted to 60 draws of the same 30 runs: its coefficients scatter as the information says."""
    law = CHINCHILLA.bind({name: synthetic.COEFFICIENTS[name] for name in CHINCHILLA.names})
    full = synthetic.table(0)
    full = full.where(~full.quantized)
    exact = law.loss(*(full.column(name) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")))
    predicted = Certainty.of(law, information(law, runs_of(full), 0.002)).parameters
    found = []
    for seed in range(60):
        noise = np.random.default_rng(seed).standard_normal(len(full))
        drawn = full.frame.assign(loss=exact * np.exp(0.002 * noise))
        found.append(fit(CHINCHILLA, RunTable.from_frame(drawn), starts=1, delta=1.0).theta)
    scatter = np.std(np.log(found), axis=0)  # of an exponent in relative units, too
    for name, value, log_scatter in zip(CHINCHILLA.names, law.theta, scatter, strict=True):
        relative = predicted[name] / (value if name in ("gamma", "eta") else 1.0)
        assert 0.7 < log_scatter / relative < 1.4, name  # 60 draws know a standard deviation to 9 %


def test_what_the_runs_do_not_determine_is_infinite() -> None:
    """At one width nothing tells a factor from its power of two, and the split is known all the same."""
    law = synthetic.law()
    table = synthetic.table(0)
    certainty = Certainty.of(law, information(law, runs_of(table.of_width(4.0)), 0.002))
    errors = certainty.parameters
    assert {name for name, error in errors.items() if math.isinf(error)} == {
        "theta", "kappa", "phi", "chi", "lambda", "mu",
    }  # fmt: skip
    assert errors["gamma"] < 0.01
    assert certainty.fraction(396e6, 100e9, 4.0) < 0.1
    assert math.isinf(certainty.fraction(396e6, 100e9, 1.0)), "how the terms change with the width is not known"


def test_from_scratch_is_no_information_under_this_law() -> None:
    one = np.ones(1)
    mixed, scratch = Runs(1e8 * one, 1e9 * one, 1e9 * one, 2 * one), Runs(1e8 * one, 0 * one, 2e9 * one, 2 * one)
    assert len((mixed + scratch).described(synthetic.law())) == 1
