"""Whether a law predicts what it was not fitted on: the largest models, the longest runs; and laws against each other.

In-sample R² of any of them is above 0.95. Only runs beyond the data tell them apart, and only U-curves
(`qatlaw.curves`) tell whether the optimal fraction is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qatlaw.curves import Curve, FractionErrors, fraction_errors, measured_curves
from qatlaw.errors import InputError
from qatlaw.fit import Quality, fit, fit_per_bits, quality, quality_per_bits
from qatlaw.laws.base import Law, LawForm
from qatlaw.laws.points import Floats
from qatlaw.table import RunTable

Axis = Literal["n_params", "tokens_total"]
AXES: dict[Axis, str] = {"n_params": "the largest models", "tokens_total": "the longest runs"}


@dataclass(frozen=True)
class LeaveOut:
    """A law fitted without the upper end of an axis, and its errors there."""

    axis: Axis
    above: float
    """Runs with more than that were left out of the fit."""
    fitted_on: int
    held_out: Quality
    per_bits: dict[str, Quality]


@dataclass(frozen=True)
class Comparison:
    """One form in a comparison; what could not be had is None, and `refused` says why."""

    form: LawForm
    parameters: int
    """Numbers fitted in all: of forms for one bit width, once per width."""
    in_sample: Quality | None
    held_out: dict[Axis, Quality]
    fractions: FractionErrors | None
    """None also for forms whose loss does not depend on the split."""
    refused: tuple[str, ...]


def laws_for(form: LawForm, table: RunTable, **options: Any) -> dict[float, Law]:
    """By bit width the law that describes it: the same for all of a unified form, else one fit each."""
    if form.one_width:
        return {bits: result.law for bits, result in fit_per_bits(form, table, **options).items()}
    law = fit(form, table, **options).law
    return dict.fromkeys(table.widths, law)


def predicted(laws: dict[float, Law], table: RunTable) -> Floats:
    """Losses of the table's quantized runs by the law of their width; NaN for all others.

    Full-precision runs are left out because forms for one width have one full-precision part per width.
    """
    losses = np.full(len(table), np.nan)
    columns = [table.column(name) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")]
    for bits, law in laws.items():
        rows = (columns[3] == bits) & table.quantized & law.form.describes(table.points)
        losses[rows] = law.loss(*(column[rows] for column in columns))
    return losses


def leave_out(form: LawForm, table: RunTable, axis: Axis, **options: Any) -> LeaveOut:
    """Fit without the largest value of the axis, predict the quantized runs there. `options` as for `fit`.

    InputError where too little is left to fit, or nothing to predict.
    """
    values = table.tokens_total if axis == "tokens_total" else table.column("n_params")
    above = _split(values, table, axis)
    rest, ends = table.where(values <= above), table.where((values > above) & table.quantized)
    sizes = sorted(set(rest.column("n_params").tolist()))
    if axis == "n_params" and len(sizes) < 3:
        raise InputError(
            f"{table.source}: {axis}", sizes, "two sizes say nothing of the loss of a third: too few are left to fit."
        )
    found = predicted(laws_for(form, rest, **options), ends)
    known = np.isfinite(found)
    if not known.any():
        raise InputError(f"{table.source}: {axis}", above, f"no quantized run above it that {form.name} describes.")
    ends = ends.where(known)
    return LeaveOut(axis, above, len(rest), quality(found[known], ends.loss), quality_per_bits(found[known], ends))


def compare(forms: Sequence[LawForm], table: RunTable, **options: Any) -> list[Comparison]:
    """Forms on the same quantized runs, the best by mean held-out MAE first. `options` as for `fit`."""
    curves = measured_curves(table)
    rows = [_compared(form, table, curves, options) for form in forms if form.quantized]

    def rank(row: Comparison) -> float:
        errors = [held.mae for held in row.held_out.values()]
        return float(np.mean(errors)) if len(errors) == len(AXES) else float("inf")

    return sorted(rows, key=rank)


def _compared(form: LawForm, table: RunTable, curves: list[Curve], options: dict[str, Any]) -> Comparison:
    refused = []
    in_sample = fractions = None
    held: dict[Axis, Quality] = {}
    count = len(form.parameters) * (len(table.widths) if form.one_width else 1)
    try:
        laws = laws_for(form, table, **options)
        found = predicted(laws, table)
        known = np.isfinite(found)
        in_sample = quality(found[known], table.loss[known])
        if form.has_fraction:
            fractions = fraction_errors({bits: law.optimal_fraction for bits, law in laws.items()}, curves).get("all")
    except InputError as error:
        refused.append(str(error))
    for axis in AXES:
        try:
            held[axis] = leave_out(form, table, axis, **options).held_out
        except InputError as error:
            refused.append(f"without {AXES[axis]}: {error}")
    return Comparison(form, count, in_sample, held, fractions, tuple(refused))


def _split(values: Floats, table: RunTable, axis: Axis) -> float:
    """The largest size but one; of tokens, which sizes need not share, the count that a fifth of the runs lie above."""
    distinct = np.unique(values[table.quantized])
    if len(distinct) < 2:
        raise InputError(f"{table.source}: {axis}", distinct.tolist(), "needs two different values to leave one out.")
    if axis == "n_params":
        return float(distinct[-2])
    return float(min(np.quantile(values[table.quantized], 0.8), distinct[-2]))
