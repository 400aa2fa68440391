"""Bootstrap intervals of a fit's coefficients, losses and optimal fractions.

A study's grid is fixed, so residuals are drawn and not runs (B. Efron, Annals of Statistics 7, 1979). Each resample has
the losses of the fitted law plus errors. One is drawn for each run, with replacement within its bit width or within the
full-precision runs, and one for each trunk. The law is fitted again from the optimum: every resample has its own
optimum nearby.

A trunk's error is drawn from the noise that trunks of one size show (`qatlaw.noise`), which takes several seeds. With
one seed a size the loss has no interval: the trunk's error cannot be separated from the size's loss. Differences within
a trunk, and so the optimal fraction, have an interval all the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qatlaw.errors import InputError
from qatlaw.fit_file import Bootstrap
from qatlaw.fitting import FitResult, make_problem
from qatlaw.identifiability import OPEN
from qatlaw.noise import own_errors

MOST_LEVERAGE = 0.9
"""Bound on the leverage: a run that decides a parameter alone has hardly any residual."""


def bootstrap(result: FitResult, *, resamples: int = 200, seed: int = 0) -> Bootstrap:
    """Intervals for a fit; the same seed gives the same ones."""
    if resamples < 20:
        raise InputError("resamples", resamples, "must be 20 or more: the outermost ones give an interval's ends.")
    form, table, noise = result.law.form, result.table, result.noise
    problem = make_problem(form, table, noise.ratio)
    start = problem.variables(np.array(result.law.theta))
    # [runs]: the leverage is how much of its own error each run takes out of its residual, by pulling the law.
    left, singular, _ = np.linalg.svd(problem.jacobian(start), full_matrices=False)
    leverage = np.minimum((left[:, singular > OPEN * singular[0]] ** 2).sum(axis=1), MOST_LEVERAGE)
    own = own_errors(result.residuals, table.trunks, noise) / np.sqrt(1 - leverage)
    strata = np.where(table.quantized, table.column("bits"), 0.0)
    _, trunk = np.unique(table.trunks, return_inverse=True)
    predicted = problem.loss * np.exp(problem.errors(start))
    thetas = []
    for number in range(resamples):
        rng = np.random.default_rng([seed, number])
        errors = np.empty_like(own)
        for stratum in np.unique(strata):
            inside = np.flatnonzero(strata == stratum)
            errors[inside] = rng.choice(own[inside], len(inside))
        errors += (noise.draw(rng) * rng.standard_normal(trunk.max() + 1))[trunk]
        resampled = replace(problem, loss=predicted * np.exp(-errors))
        thetas.append(resampled.sound_theta(resampled.solve(start, result.delta).x))
    unknown = set(result.identifiability.open)
    # Two sizes have a loss each, and no power law between them.
    loss_sizes = tuple(sorted(set(table.column("n_params").tolist()))) if unknown & set(form.level_parameters) else None
    if not noise.trunk_is_known:
        unknown |= set(form.level_parameters)
        loss_sizes = ()
    names = tuple(name for name in form.names if name in unknown)
    return Bootstrap(form, np.stack(thetas), unknown=names, loss_sizes=loss_sizes)


def interval_notes(result: FitResult) -> list[str]:
    """Caveats about a fit's intervals that follow from the trunks of its runs."""
    notes = []
    if "seed" not in result.table.frame.columns:
        notes.append("The table has no column seed: runs of one size are assumed to share a trunk and its noise.")
    if not result.noise.trunk_is_known:
        names = ", ".join(result.law.form.level_parameters)
        seeds = "a second seed at one size alone" if result.noise.freedom else "one seed a size"
        notes.append(
            f"No interval of the loss can be given, nor of {names}: with {seeds}, the noise of a trunk cannot be "
            "separated from the loss of its size. More seeds at each size would give one. The optimal fraction is a "
            "difference within a trunk and has its interval."
        )
    return notes
