"""How far a fit can be trusted: bootstrap intervals of coefficients, losses and optimal fractions.

Runs are drawn with replacement within each bit width (and within the full-precision runs), and the law is fitted again,
from the optimum: every resample has its own optimum near it. Where runs of one U-curve share noise (`curve_noise` above
0), whole curves are drawn: runs that err together are no independent evidence.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from qatlaw.errors import LawError
from qatlaw.fit import FitResult, curve_numbers, make_problem, mapped
from qatlaw.intervals import Bootstrap
from qatlaw.laws.points import Floats
from qatlaw.problem import Problem


def bootstrap(
    result: FitResult, *, resamples: int = 200, level: float = 0.95, seed: int = 0, workers: int = 1
) -> Bootstrap:
    """Intervals for a fit. The same seed gives the same ones, whatever `workers` (processes)."""
    if resamples < 20:
        raise LawError("resamples", resamples, "20 or more: the ends of an interval come from its outermost ones.")
    if not 0 < level < 1:
        raise LawError("level", level, "between 0 and 1, such as 0.95.")
    problem = make_problem(result.law.form, result.table, result.options)
    strata = np.where(result.table.quantized, result.table.column("bits"), 0.0)
    groups = curve_numbers(result.table) if result.options.curve_noise else np.arange(len(result.table))
    once = partial(
        _refit, problem, problem.variables(np.array(result.theta)), result.delta, strata, groups.astype(np.int64), seed
    )
    return Bootstrap(result.law.form, np.stack(mapped(once, range(resamples), workers)), level)


def _refit(
    problem: Problem,
    start: Floats,
    delta: float,
    strata: Floats,
    groups: NDArray[np.int64],
    seed: int,
    number: int,
) -> Floats:
    """theta of one resample; resampling is weighting each run by how often it was drawn."""
    rng = np.random.default_rng([seed, number])
    drawn = np.zeros(len(strata))
    for stratum in np.unique(strata):
        inside = strata == stratum
        _, member = np.unique(groups[inside], return_inverse=True)
        count = int(member.max()) + 1
        drawn[inside] = np.bincount(rng.integers(0, count, count), minlength=count)[member]
    resampled = Problem(
        form=problem.form,
        points=problem.points,
        loss=problem.loss,
        weights=problem.weights * drawn,
        curves=problem.curves,
        curve_noise=problem.curve_noise,
    )
    theta = resampled.theta(resampled.solve(start, delta).x)
    bounds = [p.low for p in problem.form.parameters], [p.high for p in problem.form.parameters]
    return np.clip(theta, *bounds)
