"""Which size and which bit width a memory budget is best spent on."""

from __future__ import annotations

import numpy as np

from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.figures.law_fit import LACKING
from qatlaw.figures.style import (
    INK,
    amount,
    bits_label,
    legend_below,
    memory,
    new_figure,
    series_style,
    tidy,
)
from qatlaw.plan.waste import optimal_loss

NAME, TITLE = "equal_memory", "Loss over bit width at equal memory"
BUDGETS = 3


def draw(evidence: Evidence) -> Drawn:
    """Loss of the largest model that fits a budget at each width, its tokens split at the law's optimum."""
    laws = evidence.laws
    if laws is None:
        return Drawn(NAME, TITLE, "", lacking=LACKING)
    widths = [bits for bits in evidence.widths if laws.of(bits) is not None]
    if len(widths) < 2:
        return Drawn(NAME, TITLE, "", lacking="laws at two bit widths or more: one alone has nothing to compare with.")
    quantized = evidence.rows("sequential", "fused")
    D = float(np.median(quantized.tokens_total))
    sizes = quantized.column("n_params")
    # From the smallest model at the narrowest width to the largest at the widest, so that most of it is measured.
    middle = np.sqrt(min(widths) * max(widths)) / 8
    ends = sizes.min() * middle, sizes.max() * middle
    budgets = [float(f"{size:.1e}") for size in np.geomspace(*ends, BUDGETS if np.ptp(sizes) else 1)]
    figure = new_figure(3.9)
    axes = figure.add_subplot()
    beyond = False
    places = np.arange(len(widths), dtype=np.float64)
    for place, budget in enumerate(budgets):
        N = np.array([budget * 8 / bits for bits in widths])
        loss = np.array([float(optimal_loss(laws.of(b), n, D, b)) for n, b in zip(N, widths, strict=True)])  # type: ignore[arg-type]
        inside = laws.inside(N, D, np.array(widths))
        beyond |= not inside.all()
        colour, marker, dashes = series_style(place)
        axes.plot(places, loss, color=colour, linestyle=dashes, linewidth=1.3, label=memory(budget), zorder=3)
        for chosen, face in ((inside, colour), (~inside, "white")):
            axes.plot(
                places[chosen], loss[chosen], marker, markersize=6.5, markerfacecolor=face, markeredgecolor=colour,
                linestyle="none", zorder=4,
            )  # fmt: skip
        best = int(np.argmin(loss))
        offset = -13 if place == len(budgets) - 1 > 0 else 13  # the largest budget's line is the lowest
        axes.plot(places[best], loss[best], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=5)
        for x, y, n in zip(places, loss, N, strict=True):
            axes.annotate(
                amount(n), (x, y), (0, offset), textcoords="offset points", ha="center", va="center", fontsize=7.5,
                color=INK, zorder=6,
            )  # fmt: skip
    axes.set_xticks(places, [bits_label(bits) for bits in widths])
    axes.margins(x=0.08, y=0.14)
    tidy(axes, x="bits per quantized weight", y=f"loss by the law after {amount(D)} tokens (nats)")
    legend_below(figure, [axes])
    caption = (
        f"By the law, not measured: each line is one budget of weight memory, N·B/8 bytes; at each width stands the "
        f"model that fills it (parameters above the point), trained on {amount(D)} tokens split at the law's optimal "
        "fraction. The ring is the best width. Embedding and head count at the same width as the rest, although they "
        f"keep at least 4 bits: small models at 1 or 2 bits take more memory than this. {evidence.law_told}"
    )
    warnings = ("Hollow points lie outside of the sizes, tokens or widths of the law's runs.",) if beyond else ()
    return Drawn(NAME, TITLE, caption, figure, warnings=warnings)
