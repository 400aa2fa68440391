"""The information of runs against a linear model and against the scatter of real fits."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from qatlaw import synthetic
from qatlaw.fitting import fit
from qatlaw.information import Certainty, certainties, information, is_determined
from qatlaw.laws import CHINCHILLA, QAT_UNIFIED
from qatlaw.runs import RunRecord, planned_points
from qatlaw.table import RunTable, points_of


def test_information_of_a_linear_law_is_that_of_least_squares() -> None:
    """With only alpha to move, ln L has slope alpha / L in ln alpha, and n runs know it to s / sqrt(sum slope^2)."""
    law = synthetic.law()
    points = synthetic.table(0).points
    slopes = law.theta[0] / law.form.loss_at(law.theta, points)
    assert information(law, points, 0.002)[0, 0] == pytest.approx(np.sum(slopes**2) / 0.002**2)


def test_twice_the_runs_are_worth_a_root_of_two_and_half_the_noise_two() -> None:
    law, frame = synthetic.law(), synthetic.table(0).frame
    once = Certainty.from_information(law, information(law, points_of(frame), 0.002))
    twice = Certainty.from_information(law, information(law, points_of(pd.concat([frame, frame])), 0.002))
    quiet = Certainty.from_information(law, information(law, points_of(frame), 0.001))
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
    predicted = Certainty.from_information(law, information(law, full.points, 0.002)).parameters
    found = []
    for seed in range(60):
        noise = np.random.default_rng(seed).standard_normal(len(full))
        drawn = full.frame.assign(loss=exact * np.exp(0.002 * noise))
        found.append(fit(CHINCHILLA, RunTable.from_frame(drawn), starts=1, delta=1.0).law.theta)
    scatter = np.std(np.log(found), axis=0)  # of an exponent in relative units, too
    for name, value, log_scatter in zip(CHINCHILLA.names, law.theta, scatter, strict=True):
        relative = predicted[name] / (value if name in ("gamma", "eta") else 1.0)
        assert 0.7 < log_scatter / relative < 1.4, name  # 60 draws know a standard deviation to 9 %


def test_what_the_runs_do_not_determine_is_infinite() -> None:
    """At one width nothing tells a factor from its power of two, and the split is known all the same."""
    law = synthetic.law()
    table = synthetic.table(0)
    certainty = Certainty.from_information(law, information(law, table.of_width(4.0).points, 0.002))
    errors = certainty.parameters
    assert {name for name, error in errors.items() if math.isinf(error)} == {
        "theta", "kappa", "phi", "chi", "lambda", "mu",
    }  # fmt: skip
    assert errors["gamma"] < 0.01
    assert certainty.fraction(396e6, 100e9, 4.0) < 0.1
    assert math.isinf(certainty.fraction(396e6, 100e9, 1.0)), "how the terms change with the width is not known"


def test_from_scratch_is_no_information_under_this_law() -> None:
    law, runs = synthetic.law(), grid("sequential")
    scratch = runs.iloc[:1].assign(tokens_fp=0.0, scheme="sequential")
    ((_, without),) = certainties(law, runs, 0.002).values()
    ((_, beside),) = certainties(law, pd.concat([runs, scratch], ignore_index=True), 0.002).values()
    assert beside.parameters == without.parameters


# --- studies: what counts, and how often ---


def grid(scheme: str, **columns: object) -> pd.DataFrame:
    frame = synthetic.settings().query("n_params < 5e8")
    frame["scheme"] = frame["scheme"].replace("sequential", scheme)
    return frame.assign(**columns)


def errors_of(certainty: Certainty) -> list[float]:
    return [*certainty.parameters.values(), certainty.fraction(1.94e8, 1e10, 2.0)]


def test_runs_of_one_scheme_tell_nothing_of_the_other() -> None:
    """A fit takes one of them, so two schemes in a study are not twice the runs."""
    law = synthetic.law()
    one, other = grid("sequential"), grid("fused")
    few = other[(other["scheme"] == "fp") | (other["tokens_qat"] / other["tokens_fp"] > 0.5)]
    both = pd.concat([one, few[few["scheme"] != "fp"]], ignore_index=True)
    found = certainties(law, both, 0.002)
    assert list(found) == ["sequential", "fused"]
    for name, alone in (("sequential", one), ("fused", few)):
        assert errors_of(found[name][1]) == pytest.approx(errors_of(certainties(law, alone, 0.002)[name][1]))
    assert found["fused"][1].fraction(1.94e8, 1e10, 2.0) > 1.5 * found["sequential"][1].fraction(1.94e8, 1e10, 2.0)


def test_a_point_counts_once() -> None:
    """What is known already, and what a study has planned beside it."""
    law, runs = synthetic.law(), grid("sequential", seed="0").drop_duplicates()
    half = runs.iloc[::2]
    before, after = certainties(law, half, 0.002, known=runs)["sequential"]
    assert before is not None
    assert errors_of(after) == pytest.approx(errors_of(before)), "all of it was known"
    repeated = half.assign(seed="1")
    before, after = certainties(law, repeated, 0.002, known=runs)["sequential"]
    assert before is not None
    assert all(new < old for new, old in zip(errors_of(after), errors_of(before), strict=True)), "a repeat tells more"


def test_trials_are_one_measurement() -> None:
    """Three rates at one point are one point, as they are in a fit."""
    rates = [planned("a", 1.0), planned("b", 2.0), planned("c", 4.0), planned("d", 1.0, seed=1)]
    frame = planned_points(rates)
    assert list(frame["name"]) == ["a", "d"]


def planned(name: str, rate: float, seed: int = 0) -> RunRecord:
    final = {"n_params": 1e8, "bits": 2.0, "tokens_fp": 1e9, "tokens_qat": 1e9, "scheme": "fused"}
    recipe = {"qat.learning_rate": str(rate), "seed": str(seed), "data.seed": str(seed), "name": name}
    return RunRecord(name, name, "PLANNED", final, recipe)


def test_an_error_of_a_third_is_no_determination() -> None:
    """Of a coefficient and of an exponent; of a small exponent, where it moves its term by little, less is asked."""
    coefficient, exponent = (QAT_UNIFIED.parameters[QAT_UNIFIED.index[name]] for name in ("phi", "omega"))
    assert is_determined(coefficient, 7.0, 0.29)
    assert not is_determined(coefficient, 7.0, 0.31)
    assert is_determined(exponent, 0.2, 0.059)
    assert not is_determined(exponent, 0.2, 0.061)
    assert is_determined(exponent, 1e-4, 0.014)
    assert not is_determined(exponent, 1e-4, 0.016)


def test_a_fit_and_a_study_say_the_same_of_the_same_runs() -> None:
    """At the fitted law and the noise found: one estimator."""
    result = fit(QAT_UNIFIED, synthetic.table(0))
    noise = result.noise
    assert noise.ratio == 0, "no noise of trunks was drawn"
    ((_, after),) = certainties(result.law, result.table.frame, noise.own).values()
    assert result.certainty.parameters == pytest.approx(after.parameters, rel=1e-9)
