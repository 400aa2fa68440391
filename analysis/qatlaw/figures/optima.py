"""Measured optima: the optimal QAT fraction over tokens per parameter byte, and the U-curves behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qatlaw.amounts import amount
from qatlaw.bit_widths import bits_label
from qatlaw.figures.evidence import Drawn, Evidence, closed_form_warnings
from qatlaw.figures.style import (
    GRID,
    INK,
    SCHEME_MARKERS,
    SOFT,
    draw_law,
    legend_below,
    log_axis,
    mark,
    new_figure,
    thinned,
    tidy,
    width_dash,
    width_style,
)
from qatlaw.fraction import MEAN_ABSOLUTE_ERROR, MEASURED_S, fraction_at, tokens_per_parameter_byte
from qatlaw.laws.base import Floats
from qatlaw.table import MIXED_SCHEMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 300
MOST_ROWS, MOST_COLUMNS = 4, 4


def draw_fractions(evidence: Evidence) -> Drawn:
    """The optimal fraction: measured, by the closed form and by the law; else the fractions of the runs."""
    figure = new_figure(4.0)
    axes = figure.add_subplot()
    runs = evidence.rows(*MIXED_SCHEMES)
    S_run = runs.tokens_per_byte
    spans = np.concatenate([MEASURED_S, S_run])
    S = np.geomspace(max(spans.min(), 1.05), spans.max(), POINTS)
    inside = (MEASURED_S[0] <= S) & (MEASURED_S[1] >= S)
    draw_law(axes, S, fraction_at(S), inside, "closed form", color=INK, linewidth=2, zorder=3)
    f, error = fraction_at(S[inside]), MEAN_ABSOLUTE_ERROR
    label = f"± {error:g}, its mean error"
    axes.fill_between(S[inside], f - error, f + error, color=GRID, linewidth=0, zorder=1, label=label)
    caption = [
        "Black: the closed form f* = exp(−6.7297 / ln S) of arXiv 2509.22935, with its mean absolute error against "
        "that paper's measured optima in grey; dotted where it extrapolates (S outside 35 to 10⁵)."
    ]
    curves = [curve for curve in evidence.curves if curve.inside]
    for bits in sorted({curve.B for curve in curves}):
        own = [curve for curve in curves if bits == curve.B]
        f = np.array([curve.optimum for curve in own])
        bars = np.nan_to_num([[c.optimum - c.low for c in own], [c.high - c.optimum for c in own]])
        colour, marker = width_style(bits)
        S_own = [curve.S for curve in own]
        axes.errorbar(S_own, f, bars, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6, zorder=4)
        mark(axes, S_own, f, marker, colour, f"measured, {bits_label(bits)}")
    if curves:
        caption.append(
            f"Points: minima of {len(curves)} measured U-curves, each read off its own runs by a three-parameter fit "
            "without a law, with one standard error from the curves' scatter. Curves without a minimum inside the "
            "fractions of their runs are left out."
        )
    else:
        for bits in runs.widths:
            rows = runs.column("bits") == bits
            colour, marker = width_style(bits)
            f = (runs.column("tokens_qat") / runs.tokens_total)[rows]
            mark(axes, S_run[rows], f, marker, colour, f"fraction of a run, {bits_label(bits)}", hollow=True)
        caption.append(
            "No U-curve has its minimum inside: that takes three fractions or more at one size, token count and width. "
            "Hollow points are the fractions of the runs; they are not optima."
        )
    if laws := evidence.laws:
        # f* depends on N and B, not on S alone: it is drawn at the middle size of the law's runs.
        N = float(np.sqrt(np.prod(laws.ranges["n_params"])))
        D = np.geomspace(laws.ranges["tokens"][0] / 3, laws.ranges["tokens"][1] * 3, POINTS)
        widths = list(evidence.law_by_width)
        for bits, law in evidence.law_by_width.items():
            colour, _ = width_style(bits)
            draw_law(
                axes, D / (N * bits / 8), law.optimal_fraction(N, D, bits), laws.inside(N, D, bits),
                f"law, {bits_label(bits)}", color=colour, linewidth=1.4, linestyle=width_dash(bits, widths), zorder=4,
            )  # fmt: skip
        caption.append(
            f"Coloured lines: the law's optimum at {amount(N)} parameters; dotted beyond the tokens of its runs. "
            f"{evidence.about_law}"
        )
    log_axis(axes, spans)
    axes.set_ylim(0, 1)
    tidy(axes, x="tokens per parameter byte  S = D / (N B / 8)", y="optimal QAT fraction  f* = D_qat / D")
    legend_below(figure, [axes], columns=4)
    return Drawn(" ".join(caption), figure, warnings=closed_form_warnings(runs))


def draw_u_curves(evidence: Evidence) -> Drawn:
    """Loss over the fraction: a panel for each (N, D, B), rows by (N, D), columns by B; a choice where many exist."""
    scheme = evidence.scheme
    mixed = evidence.rows(scheme or "")
    if not len(mixed):
        return Drawn(lacking="runs with two phases (scheme sequential or fused).")
    widths = thinned(mixed.widths, MOST_COLUMNS)
    settings = mixed.frame.assign(D=mixed.tokens_total).drop_duplicates(["n_params", "D", "bits", "tokens_qat"])
    sizes = settings.groupby(["n_params", "D"]).size()
    cells = sorted(sizes.index, key=lambda cell: (cell[1] / cell[0], cell))  # by tokens per parameter
    full = [cell for cell in cells if sizes[cell] == sizes.max()]
    shown = [full[int(i)] for i in thinned(range(len(full)), MOST_ROWS)]
    figure = new_figure(0.9 + 1.75 * max(len(shown), 1.4), 7.4 if len(widths) > 1 else 4.6)
    panels = figure.subplots(len(shown), len(widths), squeeze=False, sharex=True)
    for row, (N, D) in enumerate(shown):
        for column, bits in enumerate(widths):
            axes = panels[row, column]
            _draw_panel(axes, evidence, N, D, bits)
            tidy(axes, title=bits_label(bits) if row == 0 else "", x="QAT fraction f" if row == len(shown) - 1 else "")
        panels[row, 0].set_ylabel(f"{amount(N)}, {amount(D)} tokens\nloss (nats)", fontsize=8.5, color=INK)
    legend_below(figure, list(panels.flat), columns=4)
    caption = (
        f"Filled points: measured validation loss of {scheme} runs, in nats per token, at one model size, token count "
        "and bit width. f = 0 is full precision quantized after training (PTQ), f = 1 is QAT from scratch; an arrow "
        "gives the loss of one that lies above the panel. Each panel has its own axis."
    )
    if any(curve.inside for curve in evidence.curves):
        caption += " Dashed line: the measured minimum with one standard error shaded."
    caption += " Dotted line: the optimum of the closed form."
    if evidence.laws is not None:
        caption += f" Line: the law, with its minimum as a cross. {evidence.about_law}"
    if len(shown) < len(cells):
        caption += f" Shown are {len(shown)} of {len(cells)} pairs of size and tokens, over their entire range."
    return Drawn(caption, figure, warnings=closed_form_warnings(mixed))


def _draw_panel(axes: Axes, evidence: Evidence, N: float, D: float, bits: float) -> None:
    scheme = evidence.scheme or ""
    runs = evidence.cell(scheme, N, D, bits)
    f, loss = runs["f"], runs["loss"]
    colour, marker = width_style(bits)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    if not len(f):
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", fontsize=8, color=SOFT)
        axes.set_yticks([])
        return
    mark(axes, f, loss, marker, colour, f"{scheme}, {bits_label(bits)}", size=5)
    values = [loss]
    if not evidence.curves:  # neither scheme has a curve, so the other one's runs are shown as well
        (other,) = set(MIXED_SCHEMES) - {scheme}
        theirs = evidence.cell(other, N, D, bits)
        label = f"{other}, {bits_label(bits)}" if len(theirs) else "_"
        mark(axes, theirs["f"], theirs["loss"], SCHEME_MARKERS[other], colour, label, hollow=True)
        values.append(theirs["loss"])
    if law := evidence.law_by_width.get(bits):
        grid = np.linspace(0.02, 0.98, 200)
        curve = law.loss(N, D * (1 - grid), D * grid, bits)
        axes.plot(grid, curve, color=INK, linewidth=1.1, label="law", zorder=4)
        best = float(law.optimal_fraction(N, D, bits))
        axes.plot(best, law.loss(N, D * (1 - best), D * best, bits), "x", color=INK, markersize=6, zorder=6)
        values.append(curve[(grid > f.min() - 0.02) & (grid < f.max() + 0.02)])
    for one in evidence.curves:
        if one.inside and (one.N, one.D_total, one.B) == (N, D, bits):
            if np.isfinite(one.low):
                axes.axvspan(one.low, one.high, color=SOFT, alpha=0.15, linewidth=0, zorder=1)
            axes.axvline(one.optimum, color=SOFT, linewidth=1, linestyle="--", label="measured minimum", zorder=2)
    S = tokens_per_parameter_byte(N, D, bits)
    if S > 1:
        axes.axvline(fraction_at(S), color=INK, linewidth=1, linestyle=":", label="closed form", zorder=2)
    _draw_ends(axes, evidence, N, D, bits, np.concatenate(values))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.locator_params(axis="y", nbins=4)


def _draw_ends(axes: Axes, evidence: Evidence, N: float, D: float, bits: float, shown: Floats) -> None:
    """PTQ and QAT from scratch: points where they fit into the panel of the `shown` losses, else arrows."""
    low, high = shown.min(), shown.max()
    depth = max(high - low, 0.004 * low)
    reach = high + 0.8 * depth if evidence.curves else np.inf  # without a curve the ends are all there is to compare
    ends = (("ptq", 0.0, "left", "f = 0: PTQ"), ("scratch", 1.0, "right", "f = 1: from scratch"))
    arrows = False
    for scheme, f, side, label in ends:
        loss = evidence.cell(scheme, N, D, bits)["loss"]
        if not len(loss):
            continue
        mean = float(loss.mean())
        if mean >= reach:
            arrows = True
            axes.annotate(
                f"↑ {mean:.3f}", (f, 0.99), xycoords=("data", "axes fraction"), ha=side, va="top", fontsize=7, color=INK
            )
            continue
        mark(axes, np.full(len(loss), f), loss, SCHEME_MARKERS[scheme], INK, label, hollow=True)
        low, high = min(low, mean), max(high, mean)
    depth = max(depth, high - low)
    bottom, top = low - 0.12 * depth, high + 0.12 * depth
    axes.set_ylim(bottom, top + (0.22 * (top - bottom) if arrows else 0))
