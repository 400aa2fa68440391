"""Predicted against measured gaps, one panel a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qatlaw.figures.style import SOFT, WIDTH, legend_below, mark, new_figure, series_style, tidy
from qatlaw.judge import FULL, Candidate, fit_hashes, measured_gaps, precisions
from qatlaw.tables import JudgedTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Each point is a run: its loss above the full-precision run of its size, tokens and seed, as measured and as a law "
    "predicts it, in nats. On the line both agree. Filled: the law was not fitted on this table. A table without "
    "full-precision runs shows losses."
)


def draw_judged(candidates: Sequence[Candidate], tables: Sequence[JudgedTable]) -> Figure:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    across = min(len(tables), 2)
    down = -(-len(tables) // across)
    figure = new_figure(0.5 + 3.1 * down, WIDTH if across > 1 else WIDTH / 1.6)
    places: dict[str, int] = {}
    panels = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for axes, table in zip(panels, tables, strict=False):
        gaps, own = measured_gaps(table.runs), {table.name, *fit_hashes(table.runs)}
        by_gap = bool(np.isfinite(gaps).any())
        ends: list[float] = []
        for candidate in candidates:
            loss, full = candidate.losses(table.runs)
            x, y = (gaps, loss - full) if by_gap else (table.runs.loss, loss)
            shown = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0) & (precisions(table.runs) != FULL)
            if not shown.any():
                continue
            place = places.setdefault(candidate.name, len(places))
            colour, marker, _ = series_style(place)
            inside = candidate.fitted_on in own
            size, front = 3.5 if inside else 5, 5 + 1 / shown.sum()  # the law with few points lies on top
            mark(axes, x[shown], y[shown], marker, colour, candidate.name, hollow=inside, size=size, zorder=front)
            ends += [*x[shown], *y[shown]]
        what = "gap" if by_gap else "loss"
        tidy(axes, table.label, f"measured {what} (nats)", f"predicted {what} (nats)")
        if ends:
            line = np.array([min(ends) * 0.8, max(ends) * 1.25])
            axes.plot(line, line, color=SOFT, linewidth=1, zorder=2)
        else:
            axes.text(0.5, 0.5, "no law speaks of it", transform=axes.transAxes, ha="center", color=SOFT)
        if ends and by_gap:
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
    for axes in panels[len(tables) :]:
        axes.set_axis_off()
    legend_below(figure, panels, columns=4)
    return figure
