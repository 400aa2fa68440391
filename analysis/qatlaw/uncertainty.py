"""How far a fit can be trusted: bootstrap intervals of coefficients, losses and optimal fractions.

The grid of a study is fixed, so its residuals are drawn and not its runs (B. Efron, Annals of Statistics 7, 1979): each
resample has the losses of the fitted law with errors drawn with replacement within each bit width (and within the
full-precision runs), and with one more error for each trunk. The law is fitted again, from the optimum: every resample
has its own optimum near it.

The trunks' error is drawn from the noise that trunks of one size show (`qatlaw.noise`), which takes several seeds.
With one seed a size no interval of the loss can be given: the trunk's error is part of what looks like the size's loss.
Differences within a trunk, and so the optimal fraction, have an interval all the same.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from qatlaw.errors import InputError
from qatlaw.fit import FitResult, make_problem, mapped
from qatlaw.identifiability import OPEN
from qatlaw.intervals import Bootstrap
from qatlaw.laws.points import Floats
from qatlaw.noise import Noise, own_errors
from qatlaw.problem import Problem

MOST_LEVERAGE = 0.9
"""A run that decides a parameter alone has no residual to speak of."""


def bootstrap(
    result: FitResult, *, resamples: int = 200, level: float = 0.95, seed: int = 0, workers: int = 1
) -> Bootstrap:
    """Intervals for a fit. The same seed gives the same ones, whatever `workers` (processes)."""
    if resamples < 20:
        raise InputError("resamples", resamples, "20 or more: the ends of an interval come from its outermost ones.")
    if not 0 < level < 1:
        raise InputError("level", level, "between 0 and 1, such as 0.95.")
    table, noise = result.table, result.noise
    problem = make_problem(result.law.form, table, result.options, noise.ratio)
    start = problem.variables(np.array(result.theta))
    own = own_errors(result.residuals, table.trunks, noise) / np.sqrt(1 - _leverage(problem, start))
    strata = np.where(table.quantized, table.column("bits"), 0.0)
    once = partial(_refit, problem, start, result.delta, strata, own, noise, seed)
    drawn = np.stack(mapped(once, range(resamples), workers))
    form = result.law.form
    unknown = set(result.identifiability.open)
    # Two sizes have a loss each, and no power law between them.
    loss_sizes = tuple(sorted(set(table.column("n_params").tolist()))) if unknown & set(form.level_parameters) else None
    if not noise.trunk_is_known:
        unknown |= set(form.level_parameters)
        loss_sizes = ()
    return Bootstrap(form, drawn, level, tuple(name for name in form.names if name in unknown), loss_sizes)


def _leverage(problem: Problem, variables: Floats) -> Floats:
    """[runs]: how much of its own error each run takes out of its residual, by pulling the law."""
    left, singular, _ = np.linalg.svd(problem.jacobian(variables), full_matrices=False)
    return np.minimum((left[:, singular > OPEN * singular[0]] ** 2).sum(axis=1), MOST_LEVERAGE)


def interval_notes(result: FitResult) -> list[str]:
    """What a reader of a fit's intervals has to know of the trunks behind its runs."""
    notes = []
    if not result.table.has_seeds:
        notes.append("The table has no column seed: runs of one size are taken to share a trunk, and its noise.")
    if not result.noise.trunk_is_known:
        names = ", ".join(result.law.form.level_parameters)
        seeds = "a second seed at one size alone" if result.noise.freedom else "one seed a size"
        notes.append(
            f"No interval of the loss can be given, nor of {names}: with {seeds}, the noise of a trunk cannot be "
            "separated from the loss of its size. More seeds at each size would give one. The optimal fraction is a "
            "difference within a trunk and has its interval."
        )
    return notes


def _refit(
    problem: Problem,
    start: Floats,
    delta: float,
    strata: Floats,
    own: Floats,
    noise: Noise,
    seed: int,
    number: int,
) -> Floats:
    """theta of one resample."""
    rng = np.random.default_rng([seed, number])
    errors = np.empty_like(own)
    for stratum in np.unique(strata):
        inside = np.flatnonzero(strata == stratum)
        errors[inside] = rng.choice(own[inside], len(inside))
    _, trunk = np.unique(problem.trunks, return_inverse=True)
    errors += (noise.draw(rng) * rng.standard_normal(trunk.max() + 1))[trunk]
    predicted = problem.loss * np.exp(problem.errors(start))
    resampled = Problem(
        form=problem.form,
        points=problem.points,
        loss=predicted * np.exp(-errors),
        weights=problem.weights,
        trunks=problem.trunks,
        trunk_noise=problem.trunk_noise,
    )
    theta = resampled.theta(resampled.solve(start, delta).x)
    bounds = [p.low for p in problem.form.parameters], [p.high for p in problem.form.parameters]
    return np.clip(theta, *bounds)
