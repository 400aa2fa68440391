"""Loss over the QAT fraction at one size, token count and bit width: the U-curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qatlaw.figures.evidence import Drawn, Evidence, closed_form_warnings
from qatlaw.figures.style import (
    INK,
    SCHEME_MARKERS,
    SOFT,
    bits_label,
    legend_below,
    new_figure,
    thinned,
    tidy,
    width_style,
)
from qatlaw.fraction import amount, optimal_fraction, tokens_per_parameter_byte
from qatlaw.laws.points import Floats
from qatlaw.table import MIXED_SCHEMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME, TITLE = "u_curves", "Loss over the QAT fraction"
MOST_ROWS, MOST_COLUMNS = 4, 4


def draw(evidence: Evidence) -> Drawn:
    """One panel for each (N, D, B), rows by (N, D), columns by B; a choice of them where there are many."""
    scheme = evidence.scheme
    mixed = evidence.rows(scheme) if scheme else None
    if mixed is None or not len(mixed):
        return Drawn(NAME, TITLE, "", lacking="runs with two phases (scheme sequential or fused).")
    widths = thinned(sorted(set(mixed.column("bits").tolist())), MOST_COLUMNS)
    cells = [cell for cell in evidence.cells if _fractions(evidence, *cell) > 0]
    rich = max(_fractions(evidence, *cell) for cell in cells)
    full = [cell for cell in cells if _fractions(evidence, *cell) == rich]
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
        f"Filled points: validation loss in nats per token of {scheme} runs, as measured, at one model size, token "
        "count and bit width; f = 0 is full precision quantized after training (PTQ), f = 1 is QAT from scratch, where "
        "they were run; an arrow with its loss stands for one that lies above the panel. Each panel has its own axis."
    )
    if any(curve.inside for curve in evidence.curves):
        caption += " Dashed line: the measured minimum with one standard error shaded."
    caption += " Dotted line: the optimum of the closed form."
    if evidence.laws is not None:
        caption += f" Line: the law, with its minimum as a cross. {evidence.law_told}"
    if len(shown) < len(cells):
        caption += f" Shown are {len(shown)} of {len(cells)} pairs of size and tokens, over their whole range."
    return Drawn(NAME, TITLE, caption, figure, warnings=closed_form_warnings(mixed))


def mixed_runs(evidence: Evidence, scheme: str, N: float, D: float, bits: float) -> tuple[Floats, Floats]:
    """(fractions, losses) of the runs of one cell."""
    frame = evidence.rows(scheme).frame
    own = frame[(frame["n_params"] == N) & (frame["bits"] == bits) & (frame["tokens_fp"] + frame["tokens_qat"] == D)]
    return (own["tokens_qat"] / D).to_numpy(np.float64), own["loss"].to_numpy(np.float64)


def _fractions(evidence: Evidence, N: float, D: float) -> int:
    """Distinct quantized settings of a cell: how rich its row would be."""
    frame = evidence.rows(evidence.scheme or "").frame
    rows = frame[(frame["n_params"] == N) & (frame["tokens_fp"] + frame["tokens_qat"] == D)]
    return len(rows.drop_duplicates(["bits", "tokens_qat"]))


def _draw_panel(axes: Axes, evidence: Evidence, N: float, D: float, bits: float) -> None:
    assert evidence.scheme is not None
    f, loss = mixed_runs(evidence, evidence.scheme, N, D, bits)
    colour, marker = width_style(bits)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    if not len(f):
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", fontsize=8, color=SOFT)
        axes.set_yticks([])
        return
    axes.plot(
        f, loss, marker, color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.5, linestyle="none",
        label=f"{evidence.scheme}, {bits_label(bits)}", zorder=5,
    )  # fmt: skip
    values = [loss]
    if not evidence.curves:  # no scheme has a curve, so that what there is of the other one is shown with it
        (other,) = set(MIXED_SCHEMES) - {evidence.scheme}
        theirs = mixed_runs(evidence, other, N, D, bits)
        axes.plot(
            *theirs, SCHEME_MARKERS[other], markersize=5.5, markerfacecolor="white", markeredgecolor=colour,
            markeredgewidth=1.3, linestyle="none", zorder=5,
            label=f"{other}, {bits_label(bits)}" if len(theirs[0]) else "_",
        )  # fmt: skip
        values.append(theirs[1])
    law = evidence.laws.of(bits) if evidence.laws is not None else None
    if law is not None:
        grid = np.linspace(0.02, 0.98, 200)
        curve = law.loss(N, D * (1 - grid), D * grid, bits)
        axes.plot(grid, curve, color=INK, linewidth=1.1, label="law", zorder=4)
        best = float(law.optimal_fraction(N, D, bits))
        axes.plot(best, law.loss(N, D * (1 - best), D * best, bits), "x", color=INK, markersize=6, zorder=6)
        values.append(curve[(grid > f.min() - 0.02) & (grid < f.max() + 0.02)])
    _mark_optima(axes, evidence, N, D, bits)
    low, high = min(map(np.min, filter(len, values))), max(map(np.max, filter(len, values)))
    depth = max(high - low, 0.004 * low)
    _draw_ends(axes, evidence, N, D, bits, low, high, depth)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.locator_params(axis="y", nbins=4)


def _mark_optima(axes: Axes, evidence: Evidence, N: float, D: float, bits: float) -> None:
    for curve in evidence.curves:
        if curve.inside and (curve.N, curve.D_total, curve.B) == (N, D, bits):
            if np.isfinite(curve.low):
                axes.axvspan(curve.low, curve.high, color=SOFT, alpha=0.15, linewidth=0, zorder=1)
            axes.axvline(curve.optimum, color=SOFT, linewidth=1, linestyle="--", label="measured minimum", zorder=2)
    S = tokens_per_parameter_byte(N, D, bits)
    if S > 1:
        axes.axvline(optimal_fraction(S), color=INK, linewidth=1, linestyle=":", label="closed form", zorder=2)


def _draw_ends(
    axes: Axes, evidence: Evidence, N: float, D: float, bits: float, low: float, high: float, depth: float
) -> None:
    """The ends of the curve where they fit into the panel, else an arrow with the value; and full precision."""
    ends = [(0.0, "ptq", "left"), (1.0, "scratch", "right")]
    values = {scheme: evidence.losses(scheme, N, D, bits) for _, scheme, _ in ends}
    reach = high + 0.8 * depth if evidence.curves else np.inf  # without a curve the ends are what there is to see
    near = [loss.mean() for loss in values.values() if len(loss) and low - depth < loss.mean() < reach]
    depth = max(depth, max([high, *near]) - min([low, *near]))
    top, bottom = max([high, *near]) + 0.12 * depth, min([low, *near]) - 0.12 * depth
    far = False
    for f, scheme, side in ends:
        loss = values[scheme]
        if not len(loss):
            continue
        marker = {"ptq": "s", "scratch": "X"}[scheme]
        if loss.mean() < reach:
            axes.plot(
                np.full(len(loss), f), loss, marker, markersize=5.5, markerfacecolor="white", markeredgecolor=INK,
                label={"ptq": "f = 0: PTQ", "scratch": "f = 1: from scratch"}[scheme], zorder=5, linestyle="none",
            )  # fmt: skip
        else:
            far = True
            axes.annotate(
                f"↑ {loss.mean():.3f}", (f, 0.99), xycoords=("data", "axes fraction"),
                ha=side, va="top", fontsize=7, color=INK,
            )  # fmt: skip
    axes.set_ylim(bottom, top + (0.22 * (top - bottom) if far else 0))
