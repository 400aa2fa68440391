"""Common style of the figures, legible to colour-blind readers and in a grey print.

A bit width has one colour and one marker in every figure. Filled markers are measured, lines are laws; a line is thin
and dotted outside the ranges of the runs that its law was fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.amounts import amount
from qatlaw.bit_widths import BIT_WIDTHS
from qatlaw.laws.base import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#222222", "#777777", "#E4E4E4"
WIDTH = 7.4
"""Inches: the text width of a page."""

# Okabe and Ito's colours, distinct under every common form of colour blindness; the markers are distinct without them.
_WIDTHS: dict[float, tuple[str, str]] = dict(
    zip(
        BIT_WIDTHS,
        (
            ("#D55E00", "o"), ("#CC79A7", "P"), ("#E69F00", "s"), ("#56B4E9", "v"),
            ("#009E73", "^"), ("#7F7F7F", "X"), ("#0072B2", "D"), ("#000000", "p"),
        ),
        strict=True,
    )
)  # fmt: skip
_OTHER = ("#CC79A7", "h")
_DASHES: tuple[Any, ...] = (
    "solid", (0, (7, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1.4, 1.2)), (0, (8, 1.5, 1, 1.5, 1, 1.5)), (0, (4, 2.5)),
)  # fmt: skip
_SERIES: tuple[tuple[str, str], ...] = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
)  # fmt: skip
SCHEME_MARKERS = {"sequential": "o", "fused": "D", "scratch": "X", "ptq": "s"}


def width_style(bits: float) -> tuple[str, str]:
    """(colour, marker) of a bit width."""
    return _WIDTHS.get(bits, _OTHER)


def width_dash(bits: float, among: Sequence[float]) -> Any:
    """Dash pattern of a width by its rank among the widths of the figure, so that neighbours differ."""
    return _DASHES[sorted(among).index(bits) % len(_DASHES)]


def series_style(place: int) -> tuple[str, str, Any]:
    """(colour, marker, dashes) of the series at this place, where series are not bit widths."""
    colour, marker = _SERIES[place % len(_SERIES)]
    return colour, marker, _DASHES[place % len(_DASHES)]


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure without pyplot: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def literal(name: str) -> str:
    """A name as a label: matplotlib would read `$…$` in it as a formula."""
    return name.replace("$", r"\$")


def tidy(axes: Axes, title: str = "", x: str = "", y: str = "", grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(True, axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, which="both")
    if title:
        axes.set_title(literal(title), fontsize=9, loc="left", color=INK)
    if x:
        axes.set_xlabel(x, fontsize=8.5, color=INK)
    if y:
        axes.set_ylabel(y, fontsize=8.5, color=INK)


def log_axis(axes: Axes, values: Floats) -> None:
    """A logarithmic x axis labelled in amounts; over less than a decade the values themselves are its ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    low, high = float(np.min(values)), float(np.max(values))
    if high < 10 * low:
        axes.xaxis.set_major_locator(FixedLocator(thinned(np.unique(values).tolist(), 4)))
        axes.xaxis.set_minor_locator(NullLocator())
        pad = max(high / low, 1.5) ** 0.15
        axes.set_xlim(low / pad, high * pad)
    else:
        axes.xaxis.set_major_locator(LogLocator(numticks=7))
        axes.xaxis.set_minor_formatter(NullFormatter())


def thinned(values: Sequence[float], most: int) -> list[float]:
    """At most so many of them, evenly spaced, including the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]


HANDLE, LETTER = 0.62, 0.062
"""Approximate inches of a legend entry's handle, and of each letter of its label."""


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 5) -> None:
    """One legend below the data, each entry once, in so many columns if they fit."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        needed = HANDLE + LETTER * max(map(len, entries))
        columns = min(columns, max(1, int(figure.get_size_inches()[0] / needed)))
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=min(columns, len(entries)),
            frameon=False, fontsize=8, handlelength=2.6, columnspacing=1.6,
        )  # fmt: skip


def mark(
    axes: Axes, x: ArrayLike, y: ArrayLike, marker: str, colour: str, label: str = "_", *, hollow: bool = False,
    size: float = 5.5, zorder: float = 5,
) -> None:  # fmt: skip
    """Points: filled with a white edge, or hollow."""
    axes.plot(
        x, y, marker, markersize=size, markerfacecolor="white" if hollow else colour,
        markeredgecolor=colour if hollow else "white", markeredgewidth=1.2 if hollow else 0.5,
        linestyle="none", label=literal(label), zorder=zorder,
    )  # fmt: skip


def draw_law(axes: Axes, x: Floats, y: Floats, inside: np.ndarray, label: str = "_", **style: Any) -> None:
    """A law's line: as styled where `inside` the data's ranges, thin and dotted beyond."""
    axes.plot(x, np.where(inside, y, np.nan), label=label, **style)
    beyond = ~inside
    beyond[1:] |= ~inside[:-1]
    beyond[:-1] |= ~inside[1:]  # the two parts meet
    thin = style | {"linewidth": 0.8, "linestyle": (0, (1, 2))}
    axes.plot(x, np.where(beyond, y, np.nan), label="_", **thin)
