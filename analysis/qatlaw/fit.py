"""Fitting a law to a table of runs.

    result = fit(QAT_UNIFIED, read_table("runs.csv"))
    result.law.optimal_fraction(396e6, 100e9, 4)

R² of the loss says little about the optimal fraction, whose U-curves are shallow: judge a fit by
`qatlaw.validation.fraction_errors` and by what `result.identifiability` says the data do not pin down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qatlaw.errors import InputError
from qatlaw.identifiability import Identifiability, identify
from qatlaw.information import Certainty, information
from qatlaw.laws.base import Law, LawForm
from qatlaw.laws.points import Floats
from qatlaw.noise import Noise, estimate_noise, own_errors
from qatlaw.problem import Problem
from qatlaw.table import MIXED_SCHEMES, RunTable

FIRST_DELTA = 5e-3
"""Of the search, before the noise is known: losses of repeated pre-training runs differ by a few thousandths [ours]."""
HUBER_EFFICIENT = 1.345
"""Huber's constant: at that many standard deviations 95 % of least squares' efficiency is kept under normal noise."""
LEAST_DELTA = 1e-5
AGREEMENT = 1e-6
"""Relative difference in cost below which two starts found the same optimum."""
ENOUGH = 3
"""Starts that agree on the best optimum before the search stops."""
NOTABLY_SHARED = 1.0
"""What the runs of one U-curve err together, over what each errs alone, from which on a fit says so."""
ROUNDS = 4
"""In which the noise and the optimum settle."""
BATCH = 4
"""Starts between two looks at whether they agree: fixed, so that the result does not depend on the workers."""

T = TypeVar("T")


@dataclass(frozen=True)
class Quality:
    """How a law meets measured losses. MAE in nats; sigma is the robust spread of the log residuals."""

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
    costs: tuple[float, ...]
    """Of all that were tried, rising."""


@dataclass(frozen=True)
class FitOptions:
    """How the residuals are judged; see `fit`."""

    delta: float | None = None
    fp_weight: float = 1.0


@dataclass(frozen=True)
class FitResult:
    """A fitted law with what is needed to judge it."""

    law: Law
    table: RunTable
    """The runs it was fitted on."""
    left_out: dict[str, int]
    """Why runs of the table given were not used, and how many."""
    options: FitOptions
    delta: float
    """Of the pseudo-Huber loss, in log loss."""
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
    """Standard errors, linearised: the bootstrap's intervals are better."""
    seed: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def theta(self) -> tuple[float, ...]:
        return self.law.theta

    @property
    def r2(self) -> float:
        return self.quality.r2

    @property
    def mae(self) -> float:
        return self.quality.mae


def fit(
    form: LawForm,
    table: RunTable,
    *,
    seed: int = 0,
    starts: int = 32,
    delta: float | None = None,
    fp_weight: float = 1.0,
    workers: int = 1,
) -> FitResult:
    """The form's coefficients that meet the table's losses best.

    seed: of the cold starts; the same seed gives the same result, whatever `workers`.
    starts: cold starts at most; the search ends when three agree on the best optimum.
    delta: log loss up to which residuals are squared, beyond which they count linearly. None: 1.345 times the
        residuals' own robust spread, which keeps 95 % of the efficiency of least squares and a deaf ear for outliers.
    fp_weight: how often a full-precision run counts.
    workers: processes. One start takes some hundredths of a second, a process half of one to begin: worth it for
        thousands of runs or slow forms only.

    InputError for what cannot be fitted: too few runs, sizes or token counts, a wrong number of widths, two schemes.
    """
    for name, value in (("starts", starts), ("workers", workers)):
        if value < 1:
            raise InputError(name, value, "1 or more.")
    if delta is not None and not delta > 0:
        raise InputError("delta", delta, "a log loss above 0, such as 0.001.")
    if not fp_weight > 0:
        raise InputError("fp_weight", fp_weight, "above 0.", "Leave full-precision runs out of the table instead.")
    options = FitOptions(delta, fp_weight)
    used, left_out = usable(form, table)
    used.check_text()
    _refuse_too_little(form, used, left_out)
    problem = make_problem(form, used, options)
    found, report = _search(problem, options.delta or FIRST_DELTA, seed, starts, workers)
    problem, solved, final_delta = _polished(problem, found, used, options)
    return _result(problem, solved, final_delta, used, left_out, options, report, seed)


def fit_per_bits(form: LawForm, table: RunTable, **options: Any) -> dict[float, FitResult]:
    """One fit per bit width, each on its own quantized runs and all full-precision runs. `options` as for `fit`."""
    if not table.widths:
        raise InputError(f"{table.source}: rows", len(table), "no run has QAT tokens.")
    return {bits: fit(form, table.of_width(bits), **options) for bits in table.widths}


def usable(form: LawForm, table: RunTable) -> tuple[RunTable, dict[str, int]]:
    """The runs a form can be fitted on, and why how many others cannot."""
    reasons: dict[str, NDArray[np.bool_]] = {
        "quantized after training, which no law here describes": (table.frame["scheme"] == "ptq").to_numpy(),
        f"not described by {form.name}: "
        + ("it has no quantization" if not form.quantized else "QAT from scratch has no full-precision tokens"): (
            ~form.describes(table.points)
        ),
    }
    left = np.zeros(len(table), dtype=bool)
    counts = {}
    for reason, rows in reasons.items():
        if new := int(np.count_nonzero(rows & ~left)):
            counts[reason] = new
        left |= rows
    return table.where(~left), counts


def make_problem(form: LawForm, table: RunTable, options: FitOptions, trunk_noise: float = 0.0) -> Problem:
    return Problem(
        form=form,
        points=table.points,
        loss=table.loss,
        weights=np.where(table.quantized, 1.0, options.fp_weight),
        trunks=table.trunks,
        trunk_noise=trunk_noise,
    )


def curve_numbers(table: RunTable) -> NDArray[np.int64]:
    """[runs]: equal for the quantized runs of one size, tokens, width and scheme; full-precision runs stand alone."""
    key = table.frame[["n_params", "bits", "scheme"]].assign(tokens=table.tokens_total)
    key["alone"] = np.where(table.quantized, -1, np.arange(len(table)))
    return key.groupby(list(key.columns)).ngroup().to_numpy(np.int64)


def quality(predicted: Floats, measured: Floats) -> Quality:
    """R² of the loss; NaN for a single run."""
    spread = float(np.sum((measured - measured.mean()) ** 2))
    r2 = 1 - float(np.sum((predicted - measured) ** 2)) / spread if spread > 0 else float("nan")
    return Quality(
        runs=len(measured),
        r2=r2,
        mae=float(np.mean(np.abs(predicted - measured))),
        sigma=robust_spread(np.log(predicted / measured)),
    )


def quality_per_bits(predicted: Floats, table: RunTable) -> dict[str, Quality]:
    groups = {"fp": ~table.quantized}
    groups |= {f"{bits:g}": table.quantized & (table.column("bits") == bits) for bits in table.widths}
    return {name: quality(predicted[rows], table.loss[rows]) for name, rows in groups.items() if rows.any()}


def robust_spread(residuals: Floats) -> float:
    """The standard deviation of normal noise with this median absolute value."""
    return float(1.4826 * np.median(np.abs(residuals)))


def shared_noise(residuals: Floats, curves: NDArray[np.int64]) -> float:
    """Standard deviation of what curves' residuals share, over that of what each run has of its own.

    Analysis of variance over the curves of two runs or more; 0 where nothing is shared or there is no such curve.
    """
    _, curve, count = np.unique(curves, return_inverse=True, return_counts=True)
    means = np.bincount(curve, residuals) / count
    several = count > 1
    freedom = int(np.sum(count[several] - 1))
    if freedom == 0:
        return 0.0
    own = float(np.sum(((residuals - means[curve]) ** 2)[several[curve]])) / freedom
    between = float(np.mean(means[several] ** 2 - own / count[several]))
    return float(np.sqrt(max(between, 0.0) / max(own, 1e-300)))


def mapped(function: Callable[[Any], T], items: Sequence[Any], workers: int) -> list[T]:
    """In order, over processes if several are asked for. Spawned: a fork of a process with threads can hang."""
    if workers == 1 or len(items) < 2:
        return [function(item) for item in items]
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, items, chunksize=-(-len(items) // workers)))


def _one_start(problem: Problem, delta: float, seed: int, number: int) -> tuple[float, Floats]:
    solved = problem.solve(problem.start(np.random.default_rng([seed, number])), delta)
    return float(solved.cost), solved.x


def _search(problem: Problem, delta: float, seed: int, starts: int, workers: int) -> tuple[Floats, Starts]:
    """The best optimum of the cold starts."""
    found: list[tuple[float, Floats]] = []
    while len(found) < starts:
        numbers = range(len(found), min(len(found) + BATCH, starts))
        found += mapped(partial(_one_start, problem, delta, seed), numbers, workers)
        best = min(cost for cost, _ in found)
        agreeing = sum(cost <= best * (1 + AGREEMENT) for cost, _ in found)
        if agreeing >= ENOUGH:
            break
    found.sort(key=lambda pair: pair[0])
    return found[0][1], Starts(len(found), agreeing, tuple(cost for cost, _ in found))


def _polished(problem: Problem, variables: Floats, table: RunTable, options: FitOptions) -> tuple[Problem, Any, float]:
    """The optimum at the final delta, under the trunks' noise. An unknown delta, that noise and the residuals they make
    settle in a few rounds."""
    delta = options.delta or FIRST_DELTA
    for _ in range(ROUNDS):
        noise = _noise(problem, variables, table)
        problem = replace(problem, trunk_noise=noise.ratio)
        if options.delta is None:
            delta = max(HUBER_EFFICIENT * robust_spread(problem.residuals(variables)), LEAST_DELTA)
        solved = problem.solve(variables, delta, tolerance=1e-14)
        variables = solved.x
    return problem, solved, delta


def _noise(problem: Problem, variables: Floats, table: RunTable) -> Noise:
    return estimate_noise(problem.errors(variables), table.trunks, table.column("n_params"), len(variables))


def _result(
    problem: Problem,
    solved: Any,
    delta: float,
    table: RunTable,
    left_out: dict[str, int],
    options: FitOptions,
    report: Starts,
    seed: int,
) -> FitResult:
    theta = np.clip(
        problem.theta(solved.x), [p.low for p in problem.form.parameters], [p.high for p in problem.form.parameters]
    )
    law = Law(problem.form, tuple(theta.tolist()))
    residuals = problem.errors(solved.x)
    predicted = table.loss * np.exp(residuals)
    identifiability = identify(problem, solved.x, robust_spread(problem.residuals(solved.x)))
    warnings = list(identifiability.sentences)
    noise = _noise(problem, solved.x, table)
    shared = shared_noise(own_errors(residuals, table.trunks, noise), curve_numbers(table))
    if shared > NOTABLY_SHARED and noise.own > LEAST_DELTA:
        warnings.append(
            f"Runs of one U-curve err together ({shared:.2g} times what each errs alone): the law is off there."
        )
    if report.agreeing < 2:
        warnings.append(
            f"Only {report.agreeing} of {report.tried} cold starts reached the best optimum: ask for more starts."
        )
    return FitResult(
        law=law,
        table=table,
        left_out=left_out,
        options=options,
        delta=delta,
        cost=float(solved.cost),
        residuals=residuals,
        quality=quality(predicted, table.loss),
        per_bits=quality_per_bits(predicted, table),
        starts=report,
        identifiability=identifiability,
        noise=noise,
        certainty=Certainty.of(law, information(law, problem.points, max(noise.own, 1e-12), problem.whitened)),
        seed=seed,
        warnings=tuple(warnings),
    )


def _refuse_too_little(form: LawForm, table: RunTable, left_out: dict[str, int]) -> None:
    source = table.source
    told = "".join(f" {count} left out: {reason}." for reason, count in left_out.items())
    mixed = sorted(set(table.frame["scheme"]) & set(MIXED_SCHEMES))
    if len(mixed) > 1:
        raise InputError(
            f"{source}: scheme",
            mixed,
            "one two-phase scheme a fit: their U-curves differ.",
            'Fit table.of_scheme("sequential") and table.of_scheme("fused") each.',
        )
    widths = table.widths
    if form.one_width and len(widths) > 1:
        raise InputError(f"{source}: bits", widths, f"{form.name} describes one bit width.", "Use fit_per_bits.")
    reads_bits = any("2^B" in term.features for term in form.terms)
    if reads_bits and len(widths) < 2:
        raise InputError(
            f"{source}: bits",
            widths,
            f"{form.name} has terms in the bit width and needs runs of at least two.",
            "Fit qat_per_bits, or add runs at another width.",
        )
    if form.quantized and not widths:
        raise InputError(f"{source}: rows", len(table), f"{form.name} needs runs with QAT tokens.{told}")
    if len(table) <= len(form.parameters):
        raise InputError(
            f"{source}: rows",
            len(table),
            f"{form.name} has {len(form.parameters)} parameters and needs more runs than that.{told}",
            "Add runs, or fit a form with fewer parameters.",
        )
    for name, values, needed, why in (
        # Sizes of a law with an optimal fraction may be two: the fraction does not depend on the power law in N.
        ("n_params", table.column("n_params"), 2 if form.has_fraction else 3, "a power law in the parameters"),
        ("tokens_total", table.tokens_total, 3, "a power law with an offset"),
    ):
        found = sorted(set(values.tolist()))
        if len(found) < needed:
            raise InputError(f"{source}: {name}", found, f"{why} needs {needed} different values.", "Add runs.")
