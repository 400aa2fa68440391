"""One fit from a table to all that is reported of it: coefficients with intervals, quality, U-curves, rival laws.

The command line, the report and fit.json share it, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qatlaw.bit_widths import bits_label
from qatlaw.curves import Curve, FractionErrors, fraction_errors, measured_curves
from qatlaw.errors import InputError
from qatlaw.figures.style import amount
from qatlaw.fit_file import Bootstrap, FitFile, fit_file, write_fit
from qatlaw.fitting import FitResult, fit_widths
from qatlaw.fraction import closed_form
from qatlaw.information import error_text
from qatlaw.laws import FORMS
from qatlaw.laws.base import Law, LawForm
from qatlaw.table import MIXED_SCHEMES, RunTable
from qatlaw.uncertainty import bootstrap, interval_notes
from qatlaw.validation import AXES, Comparison, compare

NONE = "–"


@dataclass(frozen=True, repr=False)
class Summary:
    """A fitted law and how far it can be trusted. Printed, it is a table of coefficients."""

    label: str
    """'qat_unified', or 'qat_per_bits, 4 bits'."""
    bits: float | None
    """None for a law of all widths."""
    scheme: str
    result: FitResult
    bootstrap: Bootstrap | None
    fractions: Mapping[str, FractionErrors]
    """By width and 'all'; empty without usable U-curves, or for a law without an optimal fraction."""
    curves: Sequence[Curve]
    """The measured U-curves of the law's widths."""

    def __repr__(self) -> str:
        runs, error = len(self.result.table), self.result.quality.mae
        title = f"{self.label}, {self.scheme}: {runs} runs, mean absolute error {error:.4f} nats"
        return f"{title}\n{self.coefficients.to_string(float_format='{:.4g}'.format, na_rep=NONE)}"

    @property
    def law(self) -> Law:
        return self.result.law

    @property
    def coefficients(self) -> pd.DataFrame:
        """value, low and high (ends of the interval) by parameter; NaN where the runs do not determine it."""
        ends = self.bootstrap.coefficients if self.bootstrap else {}
        rows = {
            name: (np.nan if name in self.result.identifiability.open else value, *ends.get(name, (np.nan, np.nan)))
            for name, value in self.law.coefficients.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])

    def save(self, path: str | Path) -> None:
        """Write fit.json, which `qatlaw.read_fit` reads and `qatscale plan --law` plans by."""
        write_fit(path, self.file)

    @property
    def warnings(self) -> list[str]:
        """Caveats about the coefficients and their intervals."""
        return [*self.result.warnings, *(interval_notes(self.result) if self.bootstrap else [])]

    @property
    def closed_form(self) -> Mapping[str, FractionErrors]:
        """The published closed form against the same curves."""
        return fraction_errors(closed_form, [curve for curve in self.curves if curve.S > 1])

    @property
    def file(self) -> FitFile:
        errors = {bits: asdict(error) for bits, error in self.fractions.items()}
        more: dict[str, Any] = {"scheme": self.scheme, "fraction_errors": errors, "warnings": self.warnings}
        if error := self.fractions.get("all"):
            more["fraction_mae"] = error.mae
        if published := self.closed_form.get("all"):
            more["closed_form_fraction_mae"] = published.mae
        return fit_file(self.result, self.bootstrap, **more)

    @property
    def noise(self) -> str:
        """The noise of its runs in a sentence."""
        noise = self.result.noise
        own = f"A run's own noise is {noise.own:.2%} of its loss"
        if noise.shared == 0:
            return f"{own}; no two runs share a trunk."
        known = f"{noise.trunk:.2%}, by {noise.freedom} degrees of freedom" if noise.trunk_is_known else "not known"
        return f"{own}, that of a trunk (size and seed) {known}."


def scheme_of(table: RunTable, asked: str | None, *, either: bool = False) -> str:
    """The two-phase scheme to fit. InputError where the runs are of both and none was chosen.

    either: of both, the one with more runs.
    """
    counts = table.mixed_schemes
    if asked is not None:
        if asked not in MIXED_SCHEMES:
            raise InputError("--scheme", asked, f"is not one of {', '.join(MIXED_SCHEMES)}.")
        if asked not in counts:
            fix = f"It has: {', '.join(counts) or 'none'}."
            raise InputError("--scheme", asked, f"{table.source} has no such run.", fix)
        return asked
    if len(counts) > 1 and not either:
        runs = ", ".join(f"{count} {name}" for name, count in counts.items())
        problem = f"the runs are of both schemes ({runs}), whose U-curves differ."
        raise InputError("--scheme", None, problem, "Choose one of them.")
    if not counts:
        problem = "no run has two phases, so no split of the tokens was measured."
        raise InputError(f"{table.source}: scheme", None, problem)
    return next(iter(counts))


def form_named(name: str) -> LawForm:
    """InputError, with the known names, for an unknown one."""
    if name not in FORMS:
        raise InputError("--form", name, f"is not one of {', '.join(FORMS)}.")
    return FORMS[name]


def summarise(
    form: LawForm, table: RunTable, scheme: str, *, resamples: int = 200, seed: int = 0, **options: Any
) -> list[Summary]:
    """One summary, or one for each bit width with forms of one width. `options` as for `fit`.

    resamples: of the bootstrap; 0 = no intervals.
    """
    own = table.of_scheme(scheme)
    by_width = fit_widths(form, own, seed=seed, **options)
    results: list[tuple[float | None, FitResult]] = [*by_width.items()]
    if not form.one_width:
        results = [(None, results[0][1])]
    curves = measured_curves(own)
    summaries = []
    for bits, result in results:
        drawn = bootstrap(result, resamples=resamples, seed=seed) if resamples else None
        mine = [curve for curve in curves if bits in (None, curve.B)]
        errors = fraction_errors(result.law.optimal_fraction, mine) if form.has_fraction else {}
        label = form.name if bits is None else f"{form.name}, {bits_label(bits)}"
        summaries.append(Summary(label, bits, scheme, result, drawn, errors, mine))
    return summaries


def rivals(table: RunTable, scheme: str, **options: Any) -> list[Comparison]:
    """All forms that know quantization on the same runs, the best by held-out error first."""
    return compare(list(FORMS.values()), table.of_scheme(scheme), **options)


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
    """The value of an open parameter is not printed: it depends on where the search happened to stop."""
    level = f"{summary.bootstrap.level:.0%} interval" if summary.bootstrap else "interval"
    rows: Rows = [("parameter", "value", "standard error", level, "meaning")]
    errors, numbers = summary.result.certainty.determined, summary.coefficients.to_numpy()
    for parameter, (value, low, high) in zip(summary.law.form.parameters, numbers, strict=True):
        ends = NONE if np.isnan(low) else f"{low:.4g} to {high:.4g}"
        shown = NONE if np.isnan(value) else f"{value:.5g}"
        rows.append((parameter.name, shown, error_text(parameter, errors[parameter.name]), ends, parameter.meaning))
    return rows


def quality_rows(summary: Summary) -> Rows:
    """The law in sample by bit width: its losses, and its optimal fractions beside those of the closed form."""
    rows: Rows = [("weights", "runs", "R²", "MAE (nats)", "curves", "MAE of f*", "closed form's", "error bar")]
    published = summary.closed_form
    for name, quality in {"all": summary.result.quality, **summary.result.per_bits}.items():
        curves = law = closed = bar = NONE
        if theirs := published.get(name):
            curves, closed, bar = f"{theirs.curves}", f"{theirs.mae:.3f}", f"{theirs.measurement_error:.3f}"
        if errors := summary.fractions.get(name):
            law = f"{errors.mae:.3f}"
        label = {"all": "all", "fp": "full precision"}.get(name) or bits_label(float(name))
        losses = f"{quality.runs}", f"{quality.r2:.4f}", f"{quality.mae:.4f}"
        rows.append((label, *losses, curves, law, closed, bar))
    return rows


def curve_rows(summary: Summary) -> Rows:
    """The measured optimum of every U-curve with its standard error, beside the closed form's and the law's."""
    rows: Rows = [("N", "D", "bits", "D/(N B/8)", "measured f*", "closed form", "law")]
    has_fraction = summary.result.law.form.has_fraction
    for curve in summary.curves:
        N, D, B = curve.N, curve.D_total, curve.B
        law = f"{float(summary.result.law.optimal_fraction(N, D, B)):.2f}" if has_fraction else NONE
        published = f"{closed_form(N, D, B):.2f}" if curve.S > 1 else NONE
        rows.append((amount(N), amount(D), f"{B:g}", f"{curve.S:.1f}", curve.optimum_text, published, law))
    return rows


def comparison_rows(comparison: Sequence[Comparison]) -> Rows:
    rows: Rows = [("law", "parameters", "MAE in sample", *(f"MAE on {name}" for name in AXES.values()), "MAE of f*")]
    for one in comparison:
        errors = [f"{one.held_out[axis].mae:.4f}" if axis in one.held_out else NONE for axis in AXES]
        sample = f"{one.in_sample.mae:.4f}" if one.in_sample else NONE
        split = "no optimum" if not one.form.has_fraction else f"{one.fractions.mae:.3f}" if one.fractions else NONE
        rows.append((one.form.name, f"{one.parameters}", sample, *errors, split))
    return rows
