"""One fit from a table to all that is told of it: coefficients with intervals, quality, U-curves, rival laws.

Made once for the command line, the report and fit.json, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qatlaw import fraction
from qatlaw.curves import Curve, FractionErrors, closed_form, fraction_errors, measured_curves
from qatlaw.errors import InputError
from qatlaw.figures.style import amount, bits_label
from qatlaw.fit import FitResult, fit, fit_per_bits
from qatlaw.fit_file import FitFile, fit_file, write_fit
from qatlaw.information import error_text
from qatlaw.intervals import Bootstrap
from qatlaw.laws import FORMS
from qatlaw.laws.base import LawForm
from qatlaw.table import MIXED_SCHEMES, RunTable
from qatlaw.uncertainty import bootstrap, interval_notes
from qatlaw.validation import AXES, Comparison, compare

NONE = "–"


@dataclass(frozen=True)
class Summary:
    """A fitted law and how far it can be trusted."""

    label: str
    """'qat_unified', or 'qat_per_bits, 4 bits'."""
    bits: float | None
    """Of a law for one width."""
    scheme: str
    result: FitResult
    bootstrap: Bootstrap | None
    fractions: Mapping[str, FractionErrors]
    """By width and 'all'; empty without usable U-curves, or for a law without an optimal fraction."""
    curves: Sequence[Curve]
    """The measured U-curves that the law speaks of."""

    @property
    def warnings(self) -> list[str]:
        """What a reader of the coefficients and of their intervals has to know."""
        return [*self.result.warnings, *(interval_notes(self.result) if self.bootstrap else [])]

    @property
    def closed_form(self) -> Mapping[str, FractionErrors]:
        """How the published closed form meets the same curves."""
        return fraction_errors(closed_form, self.curves)

    @property
    def file(self) -> FitFile:
        told = {bits: asdict(errors) for bits, errors in self.fractions.items()}
        whole = self.fractions.get("all")
        more: dict[str, Any] = {"fraction_mae": whole.mae} if whole else {}
        more |= {"scheme": self.scheme, "fraction_errors": told, "warnings": self.warnings}
        published = self.closed_form.get("all")
        more |= {"closed_form_fraction_mae": published.mae} if published else {}
        return fit_file(self.result, self.bootstrap, **more)

    @property
    def noise(self) -> str:
        """The noise of its runs in a sentence."""
        noise = self.result.noise
        told = f"A run's own noise is {noise.own:.2%} of its loss"
        if noise.shared == 0:
            return f"{told}; no two runs share a trunk."
        known = f"{noise.trunk:.2%}, by {noise.freedom} degrees of freedom" if noise.trunk_is_known else "not known"
        return f"{told}, that of a trunk (size and seed) {known}."


def scheme_of(table: RunTable, asked: str | None, *, either: bool = False) -> str:
    """The two-phase scheme to fit. InputError where the runs are of both and nobody chose.

    either: of both, the one with more runs.
    """
    counts = {name: int((table.frame["scheme"] == name).sum()) for name in MIXED_SCHEMES}
    there = [name for name, count in counts.items() if count]
    if asked is not None:
        if asked not in MIXED_SCHEMES:
            raise InputError("--scheme", asked, f"one of {', '.join(MIXED_SCHEMES)}.")
        if asked not in there:
            raise InputError(
                "--scheme", asked, f"{table.source} has no such run.", f"It has: {', '.join(there) or 'none'}."
            )
        return asked
    if len(there) > 1 and not either:
        told = ", ".join(f"{counts[name]} {name}" for name in there)
        raise InputError(
            "--scheme", None, f"the runs are of both ({told}), whose U-curves differ.", "Choose one of them."
        )
    if not there:
        raise InputError(
            f"{table.source}: scheme", None, "no run has two phases, so no split of the tokens was measured."
        )
    return max(there, key=lambda name: counts[name])


def form_named(name: str) -> LawForm:
    """InputError, with the names there are, for an unknown one."""
    if name not in FORMS:
        raise InputError("--form", name, f"one of {', '.join(FORMS)}.")
    return FORMS[name]


def summarise(
    form: LawForm,
    table: RunTable,
    scheme: str,
    *,
    resamples: int = 200,
    seed: int = 0,
    workers: int = 1,
    **options: Any,
) -> list[Summary]:
    """One summary, or one for each bit width of forms that describe one alone. `options` as for `fit`.

    resamples: of the bootstrap; 0 = no intervals.
    """
    own = table.of_scheme(scheme)
    results: list[tuple[float | None, FitResult]] = []
    if form.one_width:
        results += fit_per_bits(form, own, seed=seed, workers=workers, **options).items()
    else:
        results.append((None, fit(form, own, seed=seed, workers=workers, **options)))
    curves = measured_curves(own)
    summaries = []
    for bits, result in results:
        drawn = bootstrap(result, resamples=resamples, seed=seed, workers=workers) if resamples else None
        mine = [curve for curve in curves if bits in (None, curve.B)]
        errors = fraction_errors(result.law.optimal_fraction, mine) if form.has_fraction else {}
        label = form.name if bits is None else f"{form.name}, {bits_label(bits)}"
        summaries.append(Summary(label, bits, scheme, result, drawn, errors, mine))
    return summaries


def rivals(table: RunTable, scheme: str, **options: Any) -> list[Comparison]:
    """All forms that know quantization on the same runs, the best by held-out error first."""
    return compare([form for form in FORMS.values() if form.quantized], table.of_scheme(scheme), **options)


def write_files(summaries: Sequence[Summary], out: Path) -> list[Path]:
    """fit.json, or one file a width: fit-2bit.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for summary in summaries:
        path = out if summary.bits is None else out.with_name(f"{out.stem}-{summary.bits:g}bit{out.suffix}")
        write_fit(path, summary.file)
        paths.append(path)
    return paths


# Rows of tables, headers first: the terminal and the report print the same ones.

Rows = list[tuple[str, ...]]


def coefficient_rows(summary: Summary) -> Rows:
    """A value that no run determines is not printed: it is where the search happened to stop."""
    level = f"{summary.bootstrap.level:.0%} interval" if summary.bootstrap else "interval"
    rows: Rows = [("parameter", "value", "standard error", level, "meaning")]
    result, intervals = summary.result, summary.bootstrap.coefficients if summary.bootstrap else {}
    errors = result.certainty.determined
    for parameter, value in zip(result.law.form.parameters, result.theta, strict=True):
        interval = intervals.get(parameter.name)
        told = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else NONE
        shown = NONE if parameter.name in result.identifiability.open else f"{value:.5g}"
        error = error_text(parameter, errors[parameter.name])
        rows.append((parameter.name, shown, error, told, parameter.meaning))
    return rows


def quality_rows(summary: Summary) -> Rows:
    """The law in sample by bit width: its losses, and its optimal fractions beside those of the closed form."""
    rows: Rows = [("weights", "runs", "R²", "MAE (nats)", "curves", "MAE of f*", "closed form's", "error bar")]
    parts = {"all": summary.result.quality, **summary.result.per_bits}
    published = summary.closed_form
    for name, quality in parts.items():
        errors, theirs = summary.fractions.get(name), published.get(name)
        measured = [
            f"{theirs.curves}" if theirs else NONE,
            f"{errors.mae:.3f}" if errors else NONE,
            *((f"{theirs.mae:.3f}", f"{theirs.measurement_error:.3f}") if theirs else (NONE, NONE)),
        ]
        label = {"all": "all", "fp": "full precision"}.get(name) or bits_label(float(name))
        rows.append((label, f"{quality.runs}", f"{quality.r2:.4f}", f"{quality.mae:.4f}", *measured))
    return rows


def curve_rows(summary: Summary) -> Rows:
    """The measured optimum of every U-curve with its standard error, beside the closed form's and the law's."""
    rows: Rows = [("N", "D", "bits", "D/(N B/8)", "measured f*", "closed form", "law")]
    has_fraction = summary.result.law.form.has_fraction
    for curve in summary.curves:
        N, D, B = curve.N, curve.D_total, curve.B
        end = "at most" if curve.optimum == curve.fractions[0] else "at least"
        bar = f" ± {curve.error:.2f}" if np.isfinite(curve.error) else ""
        rows.append((
            amount(N), amount(D), f"{B:g}", f"{fraction.tokens_per_parameter_byte(N, D, B):.1f}",
            f"{curve.optimum:.2f}{bar}" if curve.inside else f"{end} {curve.optimum:.2f}",
            f"{closed_form(N, D, B):.2f}",
            f"{float(summary.result.law.optimal_fraction(N, D, B)):.2f}" if has_fraction else NONE,
        ))  # fmt: skip
    return rows


def comparison_rows(comparison: Sequence[Comparison]) -> Rows:
    held = [f"MAE on {told}" for told in AXES.values()]
    rows: Rows = [("law", "parameters", "MAE in sample", *held, "MAE of f*")]
    for one in comparison:
        errors = [f"{one.held_out[axis].mae:.4f}" if axis in one.held_out else NONE for axis in AXES]
        sample = f"{one.in_sample.mae:.4f}" if one.in_sample else NONE
        split = "no optimum" if not one.form.has_fraction else f"{one.fractions.mae:.3f}" if one.fractions else NONE
        rows.append((one.form.name, f"{one.parameters}", sample, *errors, split))
    return rows
