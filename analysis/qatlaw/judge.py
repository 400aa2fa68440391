"""Laws against tables: what each law predicts of the runs it speaks of, in loss and in the gap to full precision.

A loss depends on the text and the tokenizer, so a law of other data errs in it by a constant. The gap, a run's loss
less that of the full-precision run of its size, tokens and seed, does not: laws are ranked by their gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from qatlaw.amounts import amount
from qatlaw.bit_widths import BIT_WIDTHS, UNQUANTIZED_BITS
from qatlaw.curves import Curve, OptimalFraction, measured_curves
from qatlaw.errors import InputError
from qatlaw.fit_file import FitFile
from qatlaw.fitting import fit_widths
from qatlaw.fraction import closed_form
from qatlaw.laws import FORMS, Law
from qatlaw.laws.base import Floats
from qatlaw.laws.named import FROM_SCRATCH, Asked, NamedLaw
from qatlaw.noise import LEAST_FREEDOM
from qatlaw.summary import NONE, Rows
from qatlaw.table import MIXED_SCHEMES, RunTable
from qatlaw.tables import JudgedTable
from qatlaw.text import plural
from qatlaw.validation import predicted

LEVEL = 0.95
HOLDS = 0.25
"""A law holds where its gaps are off by less than this share of the measured ones, on average [ours]."""
FULL = "full precision"


@dataclass(frozen=True)
class Candidate:
    """A law as it is judged."""

    name: str
    source: str
    losses: Callable[[RunTable], tuple[Floats, Floats]]
    """(losses, losses of the same runs in full precision), NaN for runs that it does not speak of."""
    outside: Callable[[RunTable], str | None] = lambda _: None
    """Names what lies outside the range of its own runs."""
    fraction: OptimalFraction | None = None
    """Optimal QAT fraction of (N, D, B)."""
    scheme: str = ""
    """The two-phase scheme that it describes."""
    fitted_on: str = ""
    """Name of the table that it was fitted on, or the hash of its runs."""


@dataclass(frozen=True)
class Errors:
    """Predicted less measured values, in nats."""

    runs: int
    measured: float
    """Mean of the measured values."""
    bias: float
    mae: float
    margin: float | None
    """Half of the 95 % interval of `bias`; None where too few trunks show how trunks differ."""
    mae_margin: float | None
    """The same of `mae`."""

    @property
    def relative(self) -> float:
        """Mean absolute error over the mean measured value."""
        return self.mae / abs(self.measured)


@dataclass(frozen=True)
class Verdict:
    """One law on the runs of one table and precision."""

    table: str
    precision: str
    bits: float
    effective_bits: tuple[float, float] | None
    """Least and most stored bits per parameter of its runs; None where the table does not give them."""
    law: str
    loss: Errors
    gap: Errors | None
    """None where no full-precision run of the same size and tokens was measured, or the law has none."""
    outside: str | None
    """Which of the table's runs that it speaks of lie outside the range of its own."""
    fitted_here: bool
    """Whether the law was fitted on this table: it is not ranked."""
    rank: int | None = None
    """By the mean absolute error of the gap among laws on the same runs."""


def judge(candidates: Sequence[Candidate], tables: Sequence[JudgedTable]) -> list[Verdict]:
    """Every law on every table with quantized runs that it speaks of, in the order of tables, precisions and ranks."""
    judged: list[Verdict] = []
    for table in tables:
        runs = table.runs
        labels, gaps = precisions(runs), measured_gaps(runs)
        own = {table.name, *fit_hashes(runs)}
        answers = [(candidate, *candidate.losses(runs)) for candidate in candidates]
        answers = [answer for answer in answers if np.isfinite(answer[1][labels != FULL]).any()]
        for label in sorted(set(labels), key=_order):
            verdicts = []
            for candidate, loss, full in answers:
                rows = (labels == label) & np.isfinite(loss)
                if not rows.any():
                    continue
                paired = rows & np.isfinite(full) & np.isfinite(gaps)
                verdict = Verdict(
                    table=table.label,
                    precision=label,
                    bits=float(runs.column("bits")[rows][0]),
                    effective_bits=_ends(runs.column("effective_bits")[rows]),
                    law=candidate.name,
                    loss=errors(loss[rows], runs.loss[rows], runs.trunks[rows]),
                    gap=errors((loss - full)[paired], gaps[paired], runs.trunks[paired]) if paired.any() else None,
                    outside=candidate.outside(runs.where(np.isfinite(loss))),
                    fitted_here=candidate.fitted_on in own,
                )
                verdicts.append(verdict)
            verdicts.sort(key=lambda one: (one.gap is None, one.gap.mae if one.gap else one.loss.mae))
            ranks = count(1)
            judged += [replace(one, rank=next(ranks)) if one.gap and not one.fitted_here else one for one in verdicts]
    return judged


def errors(predicted: Floats, measured: Floats, trunks: NDArray[np.int64]) -> Errors:
    """All arrays: [runs]. Runs of one trunk err together: the intervals take trunks as units."""
    off = predicted - measured
    bias, mae = float(off.mean()), float(np.abs(off).mean())
    return Errors(len(off), float(measured.mean()), bias, mae, _margin(off, trunks), _margin(np.abs(off), trunks))


def _ends(values: Floats) -> tuple[float, float] | None:
    return (float(values.min()), float(values.max())) if np.isfinite(values).all() else None


def _margin(values: Floats, trunks: NDArray[np.int64]) -> float | None:
    """Half of the interval of the mean, with a trunk's runs as one unit and Student's quantile."""
    _, trunk = np.unique(trunks, return_inverse=True)
    sums = np.bincount(trunk, values - values.mean())
    freedom = len(sums) - 1
    if freedom < LEAST_FREEDOM:
        return None
    error = np.sqrt((freedom + 1) / freedom * np.sum(sums**2)) / len(values)
    return float(stdtrit(freedom, (1 + LEVEL) / 2) * error)


def fit_hashes(runs: RunTable) -> set[str]:
    """Hashes of the parts of a table that `qatscale fit` fits."""
    parts = [runs.of_scheme(scheme) for scheme in MIXED_SCHEMES]
    return {part.hash for own in parts for part in (own, *(own.of_width(bits) for bits in own.widths))}


def measured_gaps(runs: RunTable) -> Floats:
    """Each run's loss less the mean of the full-precision runs of its size, tokens and, if it has one, seed; or NaN."""
    frame = runs.frame.assign(D=runs.tokens_total)
    key = [name for name in ("n_params", "D", "seed") if name in frame]
    full = frame[frame["scheme"] == "fp"].groupby(key)["loss"].mean().rename("full").reset_index()
    gaps = frame["loss"] - frame.merge(full, on=key, how="left")["full"].to_numpy()
    return gaps.where(frame["scheme"] != "fp").to_numpy(np.float64)


def precisions(runs: RunTable) -> NDArray[np.str_]:
    """[runs]: W4, W4A8, W4A4 FP4, PTQ 4, full precision; with the scheme where a good part is in full precision."""
    labels = []
    fractions = runs.column("tokens_qat") / runs.tokens_total
    for row, fraction in zip(runs.frame.to_dict("records"), fractions, strict=True):
        if row["scheme"] == "fp":
            labels.append(FULL)
            continue
        label = f"PTQ {row['bits']:g}" if row["scheme"] == "ptq" else f"W{row['bits']:g}"
        label += f"A{row['a_bits']:g}" if row["a_bits"] < UNQUANTIZED_BITS else ""
        label += f" {row['method']}" if row["method"] else ""
        mixed = row["scheme"] != "ptq" and fraction < FROM_SCRATCH
        labels.append(f"{label} {row['scheme']}" if mixed else label)
    return np.array(labels)


def fraction_rows(candidates: Sequence[Candidate], table: JudgedTable) -> Rows:
    """The measured optimum of every U-curve beside the closed form's and those of the laws that have one."""
    laws = [one for one in candidates if one.fraction]
    rows: Rows = [("scheme", "N", "D", "bits", "measured f*", "closed form", *(one.name for one in laws))]
    for curve in measured_curves(table.runs):
        numbers = [closed_form(curve.N, curve.D_total, curve.B), *(_asked(one, curve) for one in laws)]
        shown = (NONE if number is None else f"{number:.2f}" for number in numbers)
        cell = amount(curve.N), amount(curve.D_total), f"{curve.B:g}"
        rows.append((curve.scheme, *cell, curve.optimum_text, *shown))
    return rows


def _asked(candidate: Candidate, curve: Curve) -> float | None:
    assert candidate.fraction is not None
    if curve.scheme != candidate.scheme:
        return None
    try:
        return float(candidate.fraction(curve.N, curve.D_total, curve.B))
    except KeyError:  # a law of another width
        return None


# --- laws as candidates ---


def published(law: NamedLaw) -> Candidate:
    def losses(runs: RunTable) -> tuple[Floats, Floats]:
        asked = Asked.from_frame(runs.frame)
        fraction = runs.column("tokens_qat") / runs.tokens_total
        described = (runs.frame["scheme"].isin(["fp", "ptq"])).to_numpy() | (fraction >= FROM_SCRATCH)
        loss = np.where(described, law.loss(asked), np.nan)
        return loss, law.loss(asked.in_full_precision)

    def outside(runs: RunTable) -> str | None:
        return law.outside(Asked.from_frame(runs.frame))

    return Candidate(law.label, law.source, losses, outside, fitted_on=law.fitted_on)


def fitted(name: str, source: str, laws: Mapping[float, Law], scheme: str, fitted_on: str = "") -> Candidate:
    """Laws by bit width. Their N is `n_params`; they know weights alone, and runs of one scheme or from scratch."""

    def losses(runs: RunTable) -> tuple[Floats, Floats]:
        full = np.full(len(runs), np.nan)
        for bits, law in laws.items():
            rows = runs.column("bits") == bits
            full[rows] = law.loss(runs.column("n_params")[rows], runs.tokens_total[rows], 0.0, bits)
        described = _weights_alone(runs) & ~runs.frame["scheme"].isin({*MIXED_SCHEMES} - {scheme}).to_numpy()
        return np.where(described, predicted(dict(laws), runs), np.nan), full

    first = next(iter(laws.values()))
    fraction = (lambda N, D, B: laws[B].optimal_fraction(N, D, B)) if first.form.has_fraction else None
    return Candidate(name, source, losses, fraction=fraction, scheme=scheme, fitted_on=fitted_on)


def _weights_alone(runs: RunTable) -> NDArray[np.bool_]:
    return ((runs.column("a_bits") == UNQUANTIZED_BITS) & (runs.frame["method"] == "")).to_numpy()


def of_file(name: str, file: FitFile) -> Candidate:
    widths = (file.range["bits"][0],) if file.law.form.one_width else BIT_WIDTHS
    source = f"{file.form}, fitted on {plural(file.data.runs, 'run')} of {file.data.source}"
    scheme = str(file.quality.get("scheme", ""))
    return fitted(name, source, dict.fromkeys(widths, file.law), scheme, file.data.hash)


def refitted(table: JudgedTable) -> tuple[list[Candidate], list[str]]:
    """Every form fitted on a table's runs of quantized weights alone; and caveats about the fits."""
    runs = table.runs.where(_weights_alone(table.runs))
    scheme = next(iter(runs.mixed_schemes), MIXED_SCHEMES[0])
    if runs.mixed_schemes:
        runs = runs.of_scheme(scheme)
    candidates, notes = [], []
    for form in FORMS.values():
        if not form.quantized:
            continue
        try:
            results = fit_widths(form, runs)
        except InputError as error:
            notes.append(f"{form.name} cannot be fitted on {table.name}: {error}")
            continue
        notes += [f"{form.name}: {line}" for line in dict.fromkeys(w for one in results.values() for w in one.warnings)]
        laws = {bits: one.law for bits, one in results.items()}
        source = f"{form.source}; coefficients fitted on {table.name}, N = n_params"
        candidates.append(fitted(form.name, source, laws, scheme, table.name))
    return candidates, notes


# --- rows for the terminal and the page ---


def verdict_rows(verdicts: Sequence[Verdict], *, full: bool = False) -> Rows:
    """The verdicts on one table, headers first. full: with the columns that do not fit a terminal."""
    more = ("loss MAE", "of the loss", "gap MAE", "effective bits") if full else ()
    rows: Rows = [("precision", "law", "runs", "loss off", "gap", "gap off", "by", "rank", *more)]
    last = ""
    for one in verdicts:
        gap, mae, runs = (NONE, NONE, NONE), NONE, f"{one.loss.runs}"
        if one.gap is not None:
            gap = f"{one.gap.measured:.4f}", _with_margin(one.gap.bias, one.gap.margin), f"{one.gap.relative:.0%}"
            mae = _with_margin(one.gap.mae, one.gap.mae_margin, ".4f")
            runs += f"/{one.gap.runs}" if one.gap.runs != one.loss.runs else ""
        rank = "fit" if one.fitted_here else NONE if one.rank is None else f"{one.rank}"
        shown = one.precision if full or one.precision != last else ""
        ends = " to ".join(f"{end:.3g}" for end in sorted({*(one.effective_bits or ())})) or NONE
        law = one.law + " *" * bool(one.outside)
        row = shown, law, runs, f"{one.loss.bias:+.3f}", *gap, rank
        rows.append((*row, f"{one.loss.mae:.4f}", f"{one.loss.relative:.1%}", mae, ends) if full else row)
        last = one.precision
    return rows


def unheld(verdicts: Sequence[Verdict]) -> list[str]:
    """Where laws were judged by gaps and the best of them is off by more than `HOLDS`."""
    best: dict[tuple[str, str], float] = {}
    for one in verdicts:
        if one.gap and one.precision != FULL and not one.fitted_here:
            place = one.table, one.precision
            best[place] = min(best.get(place, np.inf), one.gap.relative)
    return [f"{table} {precision} ({share:.0%})" for (table, precision), share in best.items() if share > HOLDS]


def _with_margin(value: float, margin: float | None, form: str = "+.4f") -> str:
    return f"{value:{form}}" + (f" ±{margin:.4f}" if margin is not None else "")


def _order(label: str) -> tuple[bool, bool, bool, str]:
    return label != FULL, label.startswith("PTQ"), label.endswith(MIXED_SCHEMES), label
