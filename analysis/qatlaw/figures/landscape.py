"""The figure of a loss landscape: a map of each view, and cuts along and across the line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qatlaw.figures.evidence import COOLDOWNS, Drawn
from qatlaw.figures.style import INK, legend_below, mark, new_figure, series_style, tidy
from qatlaw.landscape import ENDS, Landscape
from qatlaw.laws.base import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CAPTION = (
    "Held-out loss on a plane through the weights: x from the checkpoint before a cooldown to the one after it, y "
    "across, along Adam's step at the start; 1 on both axes is the distance between the two. "
)
_LEVELS = np.outer(10.0 ** np.arange(-5, 2), [1, 2, 5]).ravel()
"""Contours, in nats above the lowest point of a view; the highest _MOST that a map reaches are drawn."""
_MOST = 8
_MARKERS, _DASHES = {"before": "o", "after": "D"}, {"before": (0, (4, 2)), "after": "solid"}


def drawn_landscape(landscape: Landscape, name: str) -> Drawn:
    """The figure as one of a report."""
    caption, title = _CAPTION + " ".join(landscape.findings), f"The loss around a cooldown: {landscape.title}"
    paper = f"the loss landscape of the cooldown in {COOLDOWNS}"
    return Drawn(caption, draw_landscape(landscape), name=name, title=title, paper=paper)


def draw_landscape(landscape: Landscape) -> Figure:
    views = landscape.views
    figure = new_figure(6.4)
    panels = figure.subplot_mosaic([[views[0], views[-1]], ["along", "across"]], height_ratios=(1.2, 1))
    highest = max(landscape.grid[view].max() - landscape.grid[view].min() for view in views)
    levels = _LEVELS[highest > _LEVELS][-_MOST:]  # a shade means the same in both maps
    for view in views:
        _draw_map(panels[view], landscape, view, levels)
    panels[views[0]].set_ylabel("across (y): Adam's step at BEFORE", fontsize=8.5, color=INK)
    along, across = panels["along"], panels["across"]
    for place, view in enumerate(views):
        colour, _, _ = series_style(place)
        surface = landscape.surface(view)
        along.plot(surface.columns, surface.loc[0.0], color=colour, linewidth=1.6, label=landscape.label(view))
        for end, x in ENDS.items():
            across.plot(surface.index, surface[x], color=colour, linewidth=1.6, linestyle=_DASHES[end])
            mark(along, [x], [surface.loc[0.0, x]], _MARKERS[end], colour)
            mark(across, [0], [surface.loc[0.0, x]], _MARKERS[end], colour)
    for end in ENDS:
        across.plot([], [], color=INK, linewidth=1.6, linestyle=_DASHES[end], label=f"through {end.upper()}")
        mark(along, [], [], _MARKERS[end], INK, end.upper())
    tidy(along, "along the line, y = 0", "along (x)", "loss (nats per token)")
    tidy(across, "across it, through both ends", "across (y)")
    for axes in panels.values():
        axes.locator_params(axis="x", nbins=5)
    legend_below(figure, list(panels.values()))
    return figure


def _draw_map(axes: Axes, landscape: Landscape, view: str, levels: Floats) -> None:
    from matplotlib import colormaps

    surface = landscape.surface(view)
    lowest = landscape.grid[view].min()
    above = np.ma.masked_invalid(surface.to_numpy() - lowest)
    x, y = surface.columns, surface.index
    colours = colormaps["Blues"](np.linspace(0, 0.7, len(levels) + 1))  # light enough for labels, monotone in grey
    axes.contourf(x, y, above, levels=[-1.0, *levels], colors=colours, extend="max")
    lines = axes.contour(x, y, above, levels=levels, colors=INK, linewidths=0.5)
    axes.clabel(lines, levels[min(2, len(levels) - 1) :], fmt="%g", fontsize=6.5)  # the innermost lie too close
    if landscape.path is not None:
        px, py = [0, *landscape.path["x"]], [0, *landscape.path["y"]]
        axes.plot(px, py, color="white", linewidth=2.6, zorder=4)
        axes.plot(px, py, color=INK, linewidth=1.2, marker=".", markersize=4, label="path of the run", zorder=5)
    for end, place in ENDS.items():
        mark(axes, [place], [0], _MARKERS[end], INK, size=6.5, zorder=6)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    tidy(axes, f"{landscape.label(view)}: nats above {lowest:.3f}", "along (x): from BEFORE to AFTER", grid="x")
    axes.grid(False)
