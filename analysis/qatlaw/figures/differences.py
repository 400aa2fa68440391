"""Differences between schemes: QAT and PTQ against full precision, and fused against sequential QAT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qatlaw.bit_widths import bits_label
from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.figures.style import (
    INK,
    SCHEME_MARKERS,
    SOFT,
    amount,
    draw_law,
    legend_below,
    log_axis,
    mark,
    new_figure,
    series_style,
    thinned,
    tidy,
)
from qatlaw.laws.base import Floats
from qatlaw.plan.waste import SAVED, optimal_loss, tokens_for_loss
from qatlaw.table import MIXED_SCHEMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SIZES, MOST_NAMED = 4, 6


def draw_full_precision(evidence: Evidence) -> Drawn:
    """One panel a width: loss above that of the full-precision run of the same size and tokens."""
    known = evidence.frame.dropna(subset="gap")
    widths = sorted(set(known["bits"][known["scheme"] != "fp"].tolist()))
    if not widths:
        needs = "a full-precision run (scheme fp, with its cooldown) and a quantized one of the same size and tokens."
        return Drawn(lacking=needs)
    all_sizes = sorted(set(known["n_params"].tolist()))
    sizes = thinned(all_sizes, MOST_SIZES)
    columns = min(len(widths), 4)
    rows = -(-len(widths) // columns)
    figure = new_figure(0.9 + 2.3 * rows, 7.4 if columns > 1 else 4.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, bits in zip(panels.flat, widths, strict=False):
        for place, N in enumerate(sizes):
            _draw_size(axes, evidence, known[known["n_params"] == N], bits, place)
        axes.axhline(0, color=SOFT, linewidth=1, zorder=2)
        tidy(axes, title=bits_label(bits))
        log_axis(axes, known["D"].to_numpy())
        axes.locator_params(axis="y", nbins=5)
    for axes in panels.flat[len(widths) :]:
        axes.set_visible(False)
    for place, N in enumerate(sizes):
        colour, _, dashes = series_style(place)
        panels[0, 0].plot([], [], color=colour, linestyle=dashes, linewidth=1.4, label=amount(N))
    labels = {"ptq": "PTQ of the full-precision run", "scratch": "QAT from scratch"}
    for scheme, marker in SCHEME_MARKERS.items():
        if len(evidence.rows(scheme)):
            label = labels.get(scheme, f"{scheme}, best fraction run")
            mark(panels[0, 0], [], [], marker, SOFT, label, hollow=scheme == "ptq")
    for axes in panels[-1]:
        axes.set_xlabel("tokens D", fontsize=8.5, color=INK)
    for axes in panels[:, 0]:
        axes.set_ylabel("loss above full precision (nats)", fontsize=8.5, color=INK)
    legend_below(figure, list(panels.flat), columns=4 if columns > 1 else 2)
    caption = (
        "Points: measured validation loss minus that of the full-precision run of the same size and tokens (the zero "
        "line); QAT by the best of its measured fractions, in the quantized view. Where noise is as large as the "
        "differences between fractions, the best of many is slightly too good."
    )
    if evidence.laws is not None:
        caption += f" Lines: the law at its optimal fraction. {evidence.about_law}"
    if len(sizes) < len(all_sizes):
        caption += f" Shown are {len(sizes)} of {len(all_sizes)} sizes."
    return Drawn(caption, figure)


def _draw_size(axes: Axes, evidence: Evidence, known: pd.DataFrame, bits: float, place: int) -> None:
    """Measured gaps of one size (`known`, all widths) over tokens, and the law's."""
    colour, _, dashes = series_style(place)
    law = evidence.law_by_width.get(bits)
    for scheme, marker in SCHEME_MARKERS.items():
        gaps = known[(known["bits"] == bits) & (known["scheme"] == scheme)].groupby("D")["gap"]
        best = gaps.min() if scheme in MIXED_SCHEMES else gaps.mean()
        if len(best):
            mark(axes, best.index, best, marker, colour, hollow=scheme == "ptq")
            if law is None and len(best) > 1:  # lines distinguish the sizes in greyscale print
                axes.plot(best.index, best, color=colour, linestyle=dashes, linewidth=0.9, zorder=3)
    if law is None or evidence.laws is None or known["D"].nunique() < 2:
        return
    N, tokens = known["n_params"].iloc[0], np.geomspace(known["D"].min(), known["D"].max(), 100)
    gap = optimal_loss(law, N, tokens, bits) - law.loss(N, tokens, 0.0, bits)
    inside = evidence.laws.inside(N, tokens, bits)
    draw_law(axes, tokens, gap, inside, color=colour, linewidth=1.2, linestyle=dashes, zorder=3)


def draw_fusion(evidence: Evidence) -> Drawn:
    """Fused minus sequential loss, for pairs with the same size, width and tokens of both phases."""
    pairs = evidence.fusion_pairs
    if pairs.empty:
        needs = "pairs of a sequential and a fused run of the same size, bit width and tokens of both phases."
        return Drawn(lacking=needs)
    gap = (pairs["fused"] - pairs["sequential"]).to_numpy(np.float64)
    saved = _saved(evidence, pairs, gap)
    widths, sizes = sorted(set(pairs["bits"].tolist())), sorted(set(pairs["n_params"].tolist()))
    named = thinned(sizes, MOST_NAMED)
    columns = 2 if np.isfinite(saved).any() else 1
    figure = new_figure(3.5, 7.4 if columns == 2 else 4.6)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    # Sizes of one width stand side by side, rising to the right, so that equal values do not hide each other.
    place = np.array([widths.index(b) for b in pairs["bits"]], dtype=np.float64)
    order = np.array([sizes.index(n) for n in pairs["n_params"]])
    if len(sizes) > 1:
        place += (order / (len(sizes) - 1) - 0.5) * 0.5
    for i, N in enumerate(sizes):
        colour, marker, _ = series_style(i)
        rows = order == i
        for axes, values in zip(panels, (gap, 100 * saved), strict=False):
            mark(axes, place[rows], values[rows], marker, colour, amount(N) if N in named else "_", size=6, zorder=4)
    for axes in panels:
        axes.axhline(0, color=SOFT, linewidth=1, zorder=2)
        axes.set_xticks(range(len(widths)), [bits_label(bits) for bits in widths])
        axes.set_xlim(-0.5, len(widths) - 0.5)
        tidy(axes, x="bits per quantized weight", grid="y")
    reach = max(float(np.abs(gap).max()) * 1.25, 1e-4)
    panels[0].set_ylim(-reach, reach)
    panels[0].set_ylabel("fused − sequential loss (nats)", fontsize=8.5, color=INK)
    for y, side, text in ((0.98, "top", "sequential is better"), (0.02, "bottom", "fused is better")):
        panels[0].text(
            0.02, y, text, transform=panels[0].transAxes, va=side, fontsize=7.5, color=SOFT, style="italic", zorder=6
        )
    caption = (
        f"Measured: each of {len(pairs)} points is a pair of runs of the same size, bit width and tokens of both "
        "phases. Sequential runs have a cooldown of the full-precision phase; fused runs have one cooldown, inside the "
        "QAT phase. Quantized validation loss; points of one width stand side by side by size."
    )
    if columns == 2:
        panels[1].set_ylabel("tokens saved by fusion, %", fontsize=8.5, color=INK)
        caption += f" Right: the difference in tokens by the law ({SAVED}). {evidence.about_law}"
    legend_below(figure, list(panels), columns=6)
    return Drawn(caption, figure)


def _saved(evidence: Evidence, pairs: pd.DataFrame, gap: Floats) -> Floats:
    """[pairs] share of tokens saved; NaN without a law, or where no number of tokens is worth the difference."""
    saved = np.full(len(pairs), np.nan)
    D = (pairs["tokens_fp"] + pairs["tokens_qat"]).to_numpy(np.float64)
    N, B = pairs["n_params"].to_numpy(np.float64), pairs["bits"].to_numpy(np.float64)
    for bits, law in evidence.law_by_width.items():
        rows = bits == B
        needed = tokens_for_loss(law, N[rows], optimal_loss(law, N[rows], D[rows], bits) + gap[rows], bits, D[rows])
        saved[rows] = np.where(np.isfinite(needed), 1 - D[rows] / needed, np.nan)
    return saved
