"""The cooldown inside the QAT phase (fused) against a cooldown for each phase (sequential)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.figures.style import (
    INK,
    SOFT,
    amount,
    bits_label,
    legend_below,
    new_figure,
    series_style,
    thinned,
    tidy,
)
from qatlaw.laws.points import Floats
from qatlaw.plan.waste import SAVED, optimal_loss, tokens_for_loss
from qatlaw.table import MIXED_SCHEMES

if TYPE_CHECKING:
    import pandas as pd

NAME, TITLE = "fusion", "Fused against sequential"
CELL = ["n_params", "bits", "tokens_fp", "tokens_qat"]
MOST_SIZES = 6


def draw(evidence: Evidence) -> Drawn:
    """Differences of pairs that have size, width and both phases' tokens in common."""
    table = evidence.rows(*MIXED_SCHEMES).frame
    means = table.groupby([*CELL, "scheme"])["loss"].mean().unstack("scheme")
    if not {"sequential", "fused"} <= set(means.columns) or means.dropna().empty:
        needs = "pairs of a sequential and a fused run of the same size, bit width and tokens of both phases."
        return Drawn(NAME, TITLE, "", lacking=needs)
    pairs = means.dropna(subset=["sequential", "fused"]).reset_index()
    gap = (pairs["fused"] - pairs["sequential"]).to_numpy(np.float64)
    saved = _saved(evidence, pairs)
    widths = sorted(set(pairs["bits"].tolist()))
    sizes = sorted(set(pairs["n_params"].tolist()))
    named = thinned(sizes, MOST_SIZES)
    columns = 2 if np.isfinite(saved).any() else 1
    figure = new_figure(3.5, 7.4 if columns == 2 else 4.6)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    # Sizes stand beside each other within a width, smaller ones left, so that equal values do not hide each other.
    place = np.array([widths.index(b) for b in pairs["bits"]], dtype=np.float64)
    order = np.array([sizes.index(n) for n in pairs["n_params"]])
    if len(sizes) > 1:
        place += (order / (len(sizes) - 1) - 0.5) * 0.5
    for i, N in enumerate(sizes):
        colour, marker, _ = series_style(i)
        rows = order == i
        for axes, values in zip(panels, (gap, 100 * saved), strict=False):
            axes.plot(
                place[rows], values[rows], marker, color=colour, markersize=6, markeredgecolor="white",
                markeredgewidth=0.5, linestyle="none", label=amount(N) if N in named else "_", zorder=4,
            )  # fmt: skip
    for axes in panels:
        axes.axhline(0, color=SOFT, linewidth=1, zorder=2)
        axes.set_xticks(range(len(widths)), [bits_label(bits) for bits in widths])
        axes.set_xlim(-0.5, len(widths) - 0.5)
        tidy(axes, x="bits per quantized weight", grid="y")
    reach = max(float(np.abs(gap).max()) * 1.25, 1e-4)
    panels[0].set_ylim(-reach, reach)
    panels[0].set_ylabel("fused − sequential loss (nats)", fontsize=8.5, color=INK)
    for y, side, told in ((0.98, "top", "sequential is better"), (0.02, "bottom", "fused is better")):
        panels[0].text(
            0.02, y, told, transform=panels[0].transAxes, va=side, fontsize=7.5, color=SOFT, style="italic", zorder=6
        )
    if columns == 2:
        panels[1].set_ylabel("tokens saved by fusion, %", fontsize=8.5, color=INK)
    legend_below(figure, list(panels), columns=6)
    caption = (
        f"Measured: each point is a pair of runs ({len(pairs)} in all) of the same size, bit width and tokens in both "
        "phases, that differ in whether full precision has a cooldown of its own (sequential) or the one cooldown lies "
        "inside the QAT phase (fused). Quantized validation loss; points of one width are set side by side by size."
    )
    if columns == 2:
        caption += f" Right: what the difference is worth in tokens by the law ({SAVED}). {evidence.law_told}"
    return Drawn(NAME, TITLE, caption, figure)


def _saved(evidence: Evidence, pairs: pd.DataFrame) -> Floats:
    """[pairs] share of tokens saved; NaN without a law, or where no number of tokens is worth the difference."""
    found = np.full(len(pairs), np.nan)
    D = (pairs["tokens_fp"] + pairs["tokens_qat"]).to_numpy(np.float64)
    N, B, fused, sequential = (pairs[name].to_numpy(np.float64) for name in ("n_params", "bits", *MIXED_SCHEMES[::-1]))
    for bits in set(B.tolist()):
        law = evidence.laws.of(bits) if evidence.laws is not None else None
        if law is not None:
            rows = bits == B
            target = optimal_loss(law, N[rows], D[rows], bits) + (fused - sequential)[rows]
            needed = tokens_for_loss(law, N[rows], target, bits, D[rows])
            found[rows] = np.where(np.isfinite(needed), 1 - D[rows] / needed, np.nan)
    return found
