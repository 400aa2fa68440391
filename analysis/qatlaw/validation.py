"""Errors of a law on runs it was not fitted on, the largest models and the longest runs; laws against each other.

The in-sample R² of any law is above 0.95. Only runs beyond the data discriminate between laws, and only U-curves
(`qatlaw.curves`) test the optimal fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qatlaw.curves import Curve, FractionErrors, fraction_errors, measured_curves
from qatlaw.errors import InputError
from qatlaw.fitting import Quality, fit_widths, quality
from qatlaw.laws.base import Floats, Law, LawForm
from qatlaw.table import RunTable

Axis = Literal["n_params", "tokens_total"]
AXES: dict[Axis, str] = {"n_params": "the largest models", "tokens_total": "the longest runs"}


@dataclass(frozen=True)
class Comparison:
    """One form in a comparison; `refused` says why something is None or missing."""

    form: LawForm
    parameters: int
    """Fitted numbers: forms of one bit width are fitted once per width."""
    in_sample: Quality | None
    held_out: dict[Axis, Quality]
    fractions: FractionErrors | None
    """None also for forms whose loss does not depend on the split."""
    refused: tuple[str, ...]


def laws_for(form: LawForm, table: RunTable, **options: Any) -> dict[float, Law]:
    return {bits: result.law for bits, result in fit_widths(form, table, **options).items()}


def predicted(laws: dict[float, Law], table: RunTable) -> Floats:
    """Losses of the table's quantized runs by the law of their width; NaN for all others.

    Full-precision runs are left out because forms of one width have one full-precision part per width.
    """
    losses = np.full(len(table), np.nan)
    columns = [table.column(name) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")]
    for bits, law in laws.items():
        rows = (columns[3] == bits) & table.quantized & law.form.describes(table.points)
        losses[rows] = law.loss(*(column[rows] for column in columns))
    return losses


def held_out(form: LawForm, table: RunTable, axis: Axis, **options: Any) -> Quality:
    """Fit without the largest value of the axis, and judge the quantized runs at it. `options` as for `fit`.

    On the axis of tokens, which sizes need not share, the longest fifth of the quantized runs is left out.
    InputError where too little is left to fit, or nothing to predict.
    """
    where = f"{table.source}: {axis}"
    values = table.tokens_total if axis == "tokens_total" else table.column("n_params")
    distinct = np.unique(values[table.quantized])
    if len(distinct) < 2:
        raise InputError(where, distinct.tolist(), "needs two different values to leave one out.")
    above = float(distinct[-2])
    if axis == "tokens_total":
        above = min(above, float(np.quantile(values[table.quantized], 0.8)))
    rest, ends = table.where(values <= above), table.where((values > above) & table.quantized)
    sizes = sorted(set(rest.column("n_params").tolist()))
    if axis == "n_params" and len(sizes) < 3:
        raise InputError(where, sizes, "are too few sizes: two do not determine the loss of a third.")
    losses = predicted(laws_for(form, rest, **options), ends)
    known = np.isfinite(losses)
    if not known.any():
        raise InputError(where, above, f"no quantized run above it that {form.name} describes.")
    return quality(losses[known], ends.loss[known])


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
        losses = predicted(laws, table)
        known = np.isfinite(losses)
        in_sample = quality(losses[known], table.loss[known])
        if form.has_fraction:
            fractions = fraction_errors(lambda N, D, B: laws[B].optimal_fraction(N, D, B), curves).get("all")
    except InputError as error:
        refused.append(str(error))
    for axis in AXES:
        try:
            held[axis] = held_out(form, table, axis, **options)
        except InputError as error:
            refused.append(f"without {AXES[axis]}: {error}")
    return Comparison(form, count, in_sample, held, fractions, tuple(refused))
