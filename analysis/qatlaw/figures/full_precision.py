"""What quantization costs: QAT at each width, and quantization after training, against full precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.figures.style import (
    INK,
    SOFT,
    amount,
    bits_label,
    draw_law,
    legend_below,
    log_axis,
    new_figure,
    series_style,
    thinned,
    tidy,
)
from qatlaw.plan.waste import optimal_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME, TITLE = "against_full_precision", "QAT against full precision"
MOST_SIZES = 4
QAT_MARKERS = {"sequential": "o", "fused": "D", "scratch": "X"}


def draw(evidence: Evidence) -> Drawn:
    """One panel a width: loss above that of the full-precision run of the same size and tokens."""
    cells = [cell for cell in evidence.cells if len(evidence.losses("fp", *cell))]
    if not cells or not evidence.widths:
        needs = "a full-precision run (scheme fp, with its cooldown) and a quantized one of the same size and tokens."
        return Drawn(NAME, TITLE, "", lacking=needs)
    sizes = thinned(sorted({N for N, _ in cells}), MOST_SIZES)
    widths = [bits for bits in evidence.widths if _has_gap(evidence, cells, bits)]
    if not widths:
        return Drawn(NAME, TITLE, "", lacking="a quantized run of the same size and tokens as a full-precision one.")
    columns = min(len(widths), 4)
    rows = -(-len(widths) // columns)
    figure = new_figure(0.9 + 2.3 * rows, 7.4 if columns > 1 else 4.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    tokens = np.array([D for _, D in cells])
    for axes, bits in zip(panels.flat, widths, strict=False):
        for place, N in enumerate(sizes):
            _draw_size(axes, evidence, [cell for cell in cells if cell[0] == N], bits, place)
        axes.axhline(0, color=SOFT, linewidth=1, zorder=2)
        tidy(axes, title=bits_label(bits))
        log_axis(axes, "x", tokens)
        axes.locator_params(axis="y", nbins=5)
    for axes in panels.flat[len(widths) :]:
        axes.set_visible(False)
    for place, N in enumerate(sizes):
        colour, _, dashes = series_style(place)
        panels[0, 0].plot([], [], color=colour, linestyle=dashes, linewidth=1.4, label=amount(N))
    schemes = [s for s in (*QAT_MARKERS, "ptq") if len(evidence.rows(s))]
    for scheme in schemes:
        face = "white" if scheme == "ptq" else SOFT
        marker = QAT_MARKERS.get(scheme, "s")
        told = "PTQ of the full-precision run" if scheme == "ptq" else f"{scheme}, best fraction run"
        panels[0, 0].plot(
            [], [], marker, markerfacecolor=face, markeredgecolor=SOFT if scheme != "ptq" else INK, linestyle="none",
            label="QAT from scratch" if scheme == "scratch" else told,
        )  # fmt: skip
    for axes in panels[-1]:
        axes.set_xlabel("tokens D", fontsize=8.5, color=INK)
    for axes in panels[:, 0]:
        axes.set_ylabel("loss above full precision (nats)", fontsize=8.5, color=INK)
    legend_below(figure, list(panels.flat), columns=4 if columns > 1 else 2)
    return Drawn(NAME, TITLE, _caption(evidence, sizes, cells), figure)


def _has_gap(evidence: Evidence, cells: list[tuple[float, float]], bits: float) -> bool:
    return any(len(evidence.losses(scheme, *cell, bits)) for cell in cells for scheme in (*QAT_MARKERS, "ptq"))


def _draw_size(axes: Axes, evidence: Evidence, cells: list[tuple[float, float]], bits: float, place: int) -> None:
    """Measured gaps of one size over tokens, and the law's."""
    colour, _, dashes = series_style(place)
    law = evidence.laws.of(bits) if evidence.laws is not None else None
    for scheme in (*QAT_MARKERS, "ptq"):
        points = []
        for N, D in cells:
            losses = evidence.losses(scheme, N, D, bits)
            if len(losses):
                best = losses.mean() if scheme in ("ptq", "scratch") else losses.min()
                points.append((D, best - evidence.losses("fp", N, D).mean()))
        if points:
            x, y = np.array(points).T
            face = "white" if scheme == "ptq" else colour
            edge = colour if scheme == "ptq" else "white"
            marker = QAT_MARKERS.get(scheme, "s")
            axes.plot(
                x, y, marker, markersize=5.5, markerfacecolor=face, markeredgecolor=edge,
                markeredgewidth=1.2 if face == "white" else 0.5, linestyle="none", zorder=5,
            )  # fmt: skip
            if law is None and len(x) > 1:  # without a law's line this one tells a size in a grey print
                axes.plot(x, y, color=colour, linestyle=dashes, linewidth=0.9, zorder=3)
    if law is None or len(cells) < 2:
        return
    assert evidence.laws is not None
    N = cells[0][0]
    tokens = np.geomspace(min(d for _, d in cells), max(d for _, d in cells), 100)
    gap = optimal_loss(law, N, tokens, bits) - law.loss(N, tokens, 0.0, bits)
    draw_law(
        axes,
        tokens,
        gap,
        evidence.laws.inside(N, tokens, bits),
        color=colour,
        linewidth=1.2,
        linestyle=dashes,
        zorder=3,
    )


def _caption(evidence: Evidence, sizes: list[float], cells: list[tuple[float, float]]) -> str:
    caption = (
        "Points: measured validation loss minus that of the full-precision run of the same size and tokens, which is "
        "the zero line; QAT by its best fraction that was run, in the quantized view. Where noise is as large as the "
        "differences between fractions, the best of many is a little too good."
    )
    if evidence.laws is not None:
        caption += f" Lines: the law at its optimal fraction. {evidence.law_told}"
    total = len({N for N, _ in cells})
    if len(sizes) < total:
        caption += f" Shown are {len(sizes)} of {total} sizes."
    return caption
