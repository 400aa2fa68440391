"""Fitting a law to a table of runs.

    result = fit(QAT_UNIFIED, RunTable.read("runs.csv"))
    result.law.optimal_fraction(396e6, 100e9, 4)

R² of the loss says little about the optimal fraction, whose U-curves are shallow: judge a fit by
`qatlaw.curves.fraction_errors` and by the parameters that `result.identifiability` names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qatlaw.errors import InputError
from qatlaw.identifiability import Identifiability, identify
from qatlaw.information import Certainty, information
from qatlaw.laws.base import Floats, Law, LawForm
from qatlaw.noise import Noise, estimate_noise, own_errors
from qatlaw.problem import Problem
from qatlaw.table import MIXED_SCHEMES, RunTable

FIRST_DELTA = 5e-3
"""Delta of the search, before the noise is known: repeated pre-training runs differ by a few thousandths [ours]."""
HUBER_EFFICIENT = 1.345
"""Huber's constant: at that many standard deviations 95 % of least squares' efficiency is kept under normal noise."""
LEAST_DELTA = 1e-5
AGREEMENT = 1e-6
"""Relative difference in cost below which two starts found the same optimum."""
ENOUGH = 3
"""Starts that agree on the best optimum before the search stops."""
BATCH = 4
"""Starts between two checks of agreement."""
ROUNDS = 4
"""Rounds in which the noise and the optimum settle."""
NOTABLY_SHARED = 1.0
"""Error that the runs of a U-curve share, over each run's own error, above which a fit warns."""


@dataclass(frozen=True)
class Quality:
    """Predicted against measured losses. MAE in nats; sigma is the robust spread of the log residuals."""

    runs: int
    r2: float
    mae: float
    sigma: float


@dataclass(frozen=True)
class Starts:
    """What the cold starts found."""

    tried: int
    agreeing: int
    """How many of them reached the best optimum."""


@dataclass(frozen=True)
class FitResult:
    """A fitted law with what is needed to judge it."""

    law: Law
    table: RunTable
    left_out: dict[str, int]
    """Reason to number of the given runs that were not used."""
    delta: float
    """Log loss at which the pseudo-Huber loss turns linear."""
    cost: float
    residuals: Floats
    """log(predicted / measured loss) of `table`'s runs."""
    quality: Quality
    per_bits: dict[str, Quality]
    """By bit width ("4"), and "fp" for full-precision runs."""
    starts: Starts
    identifiability: Identifiability
    noise: Noise
    certainty: Certainty
    """Linearised standard errors: the bootstrap's intervals are better."""
    warnings: tuple[str, ...]


def fit(form: LawForm, table: RunTable, *, seed: int = 0, starts: int = 32, delta: float | None = None) -> FitResult:
    """The form's coefficients that meet the table's losses best.

    seed: of the cold starts; the same seed gives the same result.
    starts: most cold starts; the search ends when three agree on the best optimum.
    delta: log loss up to which residuals are squared, beyond which they count linearly. None: 1.345 times the robust
        spread of the residuals, which keeps 95 % of least squares' efficiency and bounds the influence of outliers.

    InputError for what cannot be fitted: too few runs, sizes or token counts, a wrong number of widths, two schemes.
    """
    if starts < 1:
        raise InputError("starts", starts, "must be 1 or more.")
    if delta is not None and not delta > 0:
        raise InputError("delta", delta, "must be a log loss above 0, such as 0.001.")
    used, left_out = usable(form, table)
    used.check_text()
    _refuse_too_little(form, used, left_out)
    problem = make_problem(form, used)
    variables, cold_starts = _search(problem, delta or FIRST_DELTA, seed, starts)
    # Delta, the trunks' noise and the residuals depend on each other, and settle in a few rounds.
    final_delta = delta or FIRST_DELTA
    for _ in range(ROUNDS):
        problem = replace(problem, trunk_noise=_noise(problem, variables, used).ratio)
        if delta is None:
            final_delta = max(HUBER_EFFICIENT * robust_spread(problem.residuals(variables)), LEAST_DELTA)
        solved = problem.solve(variables, final_delta, tolerance=1e-14)
        variables = solved.x
    law = Law(form, tuple(problem.sound_theta(variables).tolist()))
    residuals = problem.errors(variables)
    predicted = used.loss * np.exp(residuals)
    identifiability = identify(problem, variables, robust_spread(problem.residuals(variables)))
    noise = _noise(problem, variables, used)
    return FitResult(
        law=law, table=used, left_out=left_out, delta=final_delta, cost=float(solved.cost), residuals=residuals,
        quality=quality(predicted, used.loss), per_bits=quality_per_bits(predicted, used), starts=cold_starts,
        identifiability=identifiability, noise=noise,
        certainty=Certainty.from_information(
            law, information(law, problem.points, max(noise.own, 1e-12), problem.whitened)
        ),
        warnings=(*identifiability.sentences, *_curve_warning(used, residuals, noise), *_start_warning(cold_starts)),
    )  # fmt: skip


def fit_widths(form: LawForm, table: RunTable, **options: Any) -> dict[float, FitResult]:
    """By bit width: the same fit for all, or one for each with a form of one width. `options` as for `fit`.

    A fit of one width has its quantized runs and all full-precision runs.
    """
    if not form.one_width:
        return dict.fromkeys(table.widths, fit(form, table, **options))
    if not table.widths:
        raise InputError(f"{table.source}: rows", len(table), "hold no run with QAT tokens.")
    return {bits: fit(form, table.of_width(bits), **options) for bits in table.widths}


def usable(form: LawForm, table: RunTable) -> tuple[RunTable, dict[str, int]]:
    """The runs a form can be fitted on, and why how many others cannot."""
    ptq = (table.frame["scheme"] == "ptq").to_numpy()
    undescribed = ~form.describes(table.points) & ~ptq
    why = "QAT from scratch has no full-precision tokens" if form.quantized else "it has no quantization"
    reasons = {
        "quantized after training, which no law here describes": ptq,
        f"not described by {form.name}: {why}": undescribed,
    }
    counts = {reason: int(np.count_nonzero(rows)) for reason, rows in reasons.items() if rows.any()}
    return table.where(~ptq & ~undescribed), counts


def make_problem(form: LawForm, table: RunTable, trunk_noise: float = 0.0) -> Problem:
    return Problem(form, table.points, table.loss, table.trunks, trunk_noise)


def curve_numbers(table: RunTable) -> NDArray[np.int64]:
    """[runs]: equal for the quantized runs of one size, tokens, width and scheme; full-precision runs stand alone."""
    key = table.frame[["n_params", "bits", "scheme"]].assign(tokens=table.tokens_total)
    key["alone"] = np.where(table.quantized, -1, np.arange(len(table)))
    return key.groupby(list(key.columns)).ngroup().to_numpy(np.int64)


def quality(predicted: Floats, measured: Floats) -> Quality:
    """R² is NaN for a single run."""
    spread = float(np.sum((measured - measured.mean()) ** 2))
    r2 = 1 - float(np.sum((predicted - measured) ** 2)) / spread if spread > 0 else float("nan")
    mae = float(np.mean(np.abs(predicted - measured)))
    return Quality(len(measured), r2, mae, robust_spread(np.log(predicted / measured)))


def quality_per_bits(predicted: Floats, table: RunTable) -> dict[str, Quality]:
    groups = {"fp": ~table.quantized}
    groups |= {f"{bits:g}": table.quantized & (table.column("bits") == bits) for bits in table.widths}
    return {name: quality(predicted[rows], table.loss[rows]) for name, rows in groups.items() if rows.any()}


def robust_spread(residuals: Floats) -> float:
    """The standard deviation of normal noise with this median absolute value."""
    return float(1.4826 * np.median(np.abs(residuals)))


def _search(problem: Problem, delta: float, seed: int, starts: int) -> tuple[Floats, Starts]:
    """The best optimum of the cold starts."""
    optima: list[tuple[float, Floats]] = []
    agreeing = 0
    while len(optima) < starts and agreeing < ENOUGH:
        for number in range(len(optima), min(len(optima) + BATCH, starts)):
            solved = problem.solve(problem.start(np.random.default_rng([seed, number])), delta)
            optima.append((float(solved.cost), solved.x))
        best = min(cost for cost, _ in optima)
        agreeing = sum(cost <= best * (1 + AGREEMENT) for cost, _ in optima)
    return min(optima, key=lambda pair: pair[0])[1], Starts(len(optima), agreeing)


def _noise(problem: Problem, variables: Floats, table: RunTable) -> Noise:
    return estimate_noise(problem.errors(variables), table.trunks, table.column("n_params"), len(variables))


def _curve_warning(table: RunTable, residuals: Floats, noise: Noise) -> list[str]:
    """U-curves take the place of trunks here: what their runs share is the law's error."""
    rows = table.quantized
    if not rows.any():
        return []
    own = own_errors(residuals, table.trunks, noise)[rows]
    curves = estimate_noise(own, curve_numbers(table)[rows], np.zeros(len(own)), 0)
    if curves.trunk <= NOTABLY_SHARED * curves.own or noise.own <= LEAST_DELTA:
        return []
    ratio = curves.trunk / max(curves.own, 1e-300)
    return [f"The law is off in some U-curves: their runs share {ratio:.2g} times the error that each has of its own."]


def _start_warning(starts: Starts) -> list[str]:
    if starts.agreeing > 1:
        return []
    return [f"Only {starts.agreeing} of {starts.tried} cold starts reached the best optimum: ask for more starts."]


def _refuse_too_little(form: LawForm, table: RunTable, left_out: dict[str, int]) -> None:
    source, widths = table.source, table.widths
    left = "".join(f" {count} left out: {reason}." for reason, count in left_out.items())
    mixed = sorted(set(table.frame["scheme"]) & set(MIXED_SCHEMES))
    if len(mixed) > 1:
        fix = 'Fit table.of_scheme("sequential") and table.of_scheme("fused") each.'
        raise InputError(f"{source}: scheme", mixed, "are two schemes; a fit takes one, as their U-curves differ.", fix)
    if form.one_width and len(widths) > 1:
        raise InputError(f"{source}: bits", widths, f"{form.name} describes one bit width.", "Use fit_widths.")
    if any("2^B" in term.features for term in form.terms) and len(widths) < 2:
        problem = f"{form.name} has terms in the bit width and needs runs of at least two."
        raise InputError(f"{source}: bits", widths, problem, "Fit qat_per_bits, or add runs at another width.")
    if form.quantized and not widths:
        raise InputError(f"{source}: rows", len(table), f"{form.name} needs runs with QAT tokens.{left}")
    if len(table) <= len(form.parameters):
        problem = f"{form.name} has {len(form.parameters)} parameters and needs more runs than that.{left}"
        raise InputError(f"{source}: rows", len(table), problem, "Add runs, or fit a form with fewer parameters.")
    for name, values, needed, why in (
        # Two sizes are enough for a law with an optimal fraction, which does not depend on the power law in N.
        ("n_params", table.column("n_params"), 2 if form.has_fraction else 3, "a power law in the parameters"),
        ("tokens_total", table.tokens_total, 3, "a power law with an offset"),
    ):
        distinct = sorted(set(values.tolist()))
        if len(distinct) < needed:
            raise InputError(f"{source}: {name}", distinct, f"{why} needs {needed} different values.", "Add runs.")
