"""The law against its runs, and what follows from it: loss at equal memory, tokens wasted by a fixed fraction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qatlaw.bit_widths import bits_label
from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.figures.style import (
    INK,
    SOFT,
    amount,
    draw_law,
    legend_below,
    log_axis,
    mark,
    new_figure,
    series_style,
    tidy,
    width_dash,
    width_style,
)
from qatlaw.fitting import quality, robust_spread
from qatlaw.laws.base import Floats
from qatlaw.plan.run import RULE
from qatlaw.plan.waste import WASTED, optimal_loss, wasted_tokens
from qatlaw.table import MIXED_SCHEMES, RunTable
from qatlaw.validation import predicted as quantized_losses

LACKING = "a loss law: enough runs to fit one (`qatscale fit` says what is missing), or a fit.json by --law."
NOT_DESCRIBED = "runs that the law describes: of its scheme and bit widths."
BUDGETS = 3
POINTS = 120


def draw_agreement(evidence: Evidence) -> Drawn:
    table, predicted = _described(evidence)
    if evidence.laws is None or not len(table):
        return Drawn(lacking=NOT_DESCRIBED if evidence.laws else LACKING)
    figure = new_figure(4.6, 6.0)
    axes = figure.add_subplot()
    ends = np.array([min(predicted.min(), table.loss.min()), max(predicted.max(), table.loss.max())])
    ends += np.array([-0.04, 0.04]) * max(float(np.ptp(ends)), 0.02)
    axes.plot(ends, ends, color=SOFT, linewidth=1, zorder=2)
    for label, colour, marker, rows in _groups(table):
        mae = quality(predicted[rows], table.loss[rows]).mae
        mark(axes, table.loss[rows], predicted[rows], marker, colour, f"{label}: MAE {mae:.2g}", size=4, zorder=4)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_aspect("equal")
    tidy(axes, x="measured validation loss (nats per token)", y="loss by the law (nats per token)")
    legend_below(figure, [axes], columns=3)
    total = quality(predicted, table.loss)
    caption = (
        f"Each point is one of {total.runs} runs; on the line, law and measurement agree. R² {total.r2:.4f}, mean "
        f"absolute error {total.mae:.3g} nats in sample. A high R² says nothing about the optimal fraction, whose "
        f"U-curves are shallow: see the figure of the optimal fraction. {evidence.about_law}"
    )
    return Drawn(caption, figure)


def draw_residuals(evidence: Evidence) -> Drawn:
    """Residuals over size, tokens, width and fraction: a trend in any of them is an error of the law."""
    table, predicted = _described(evidence)
    if evidence.laws is None or not len(table):
        return Drawn(lacking=NOT_DESCRIBED if evidence.laws else LACKING)
    residuals = 100 * np.log(predicted / table.loss)
    spread = robust_spread(residuals)
    figure = new_figure(5.2)
    panels = figure.subplots(2, 2, sharey=True)
    places = {bits: i + 1 for i, bits in enumerate(table.widths)}
    place = np.where(table.quantized, [places.get(b, 0) for b in table.column("bits").tolist()], 0.0)
    place = place + np.random.default_rng(0).uniform(-0.22, 0.22, len(place))  # else runs of one width overlap
    axes_values = (
        (panels[0, 0], table.column("n_params"), "parameters N"),
        (panels[0, 1], table.tokens_total, "tokens D"),
        (panels[1, 0], place, "weights"),
        (panels[1, 1], table.column("tokens_qat") / table.tokens_total, "QAT fraction f"),
    )
    for axes, values, label in axes_values:
        axes.axhspan(-spread, spread, color=SOFT, alpha=0.13, linewidth=0, zorder=1)
        axes.axhline(0, color=SOFT, linewidth=1, zorder=2)
        for group, colour, marker, rows in _groups(table):
            size = 6 if marker == "*" else 4
            mark(axes, values[rows], residuals[rows], marker, colour, group, size=size, zorder=4)
        tidy(axes, x=label)
    log_axis(panels[0, 0], table.column("n_params"))
    log_axis(panels[0, 1], table.tokens_total)
    panels[1, 0].set_xticks([0, *places.values()], ["full", *map(bits_label, places)])
    for axes in panels[:, 0]:
        axes.set_ylabel("ln(law / measured), %", fontsize=8.5, color=INK)
    reach = 1.15 * float(np.quantile(np.abs(residuals), 0.995)) or 1.0
    panels[0, 0].set_ylim(-reach, reach)
    beyond = int(np.count_nonzero(np.abs(residuals) > reach))
    legend_below(figure, list(panels.flat), columns=6)
    caption = (
        "Error of the law in each run's loss, in per cent; above zero the law is too high. The band is ± one robust "
        f"standard deviation of the residuals ({spread:.2g} %). A trend along an axis is structure that the law lacks. "
        f"In the panel of the weights, points are spread sideways to be visible. {evidence.about_law}"
    )
    if beyond:
        caption += f" {beyond} run{'s lie' if beyond > 1 else ' lies'} beyond the axis."
    return Drawn(caption, figure)


def draw_memory(evidence: Evidence) -> Drawn:
    """Loss of the largest model that fits a budget at each width, its tokens split at the law's optimum."""
    from matplotlib.ticker import EngFormatter

    laws, by_width = evidence.laws, evidence.law_by_width
    if laws is None:
        return Drawn(lacking=LACKING)
    if len(by_width) < 2:
        return Drawn(lacking="laws at two bit widths or more: with one, memory cannot be traded for bits.")
    widths = np.array(list(by_width))
    runs = evidence.rows(*MIXED_SCHEMES)
    D, sizes = float(np.median(runs.tokens_total)), runs.column("n_params")
    # Budgets of the smallest and the largest model at a middle width, so that most points are within the runs' sizes.
    middle = np.sqrt(widths.min() * widths.max()) / 8
    ends = sizes.min() * middle, sizes.max() * middle
    budgets = [float(f"{size:.1e}") for size in np.geomspace(*ends, BUDGETS if np.ptp(sizes) else 1)]
    figure = new_figure(3.9)
    axes, memory = figure.add_subplot(), EngFormatter("B")  # 4e8 -> 400 MB
    places, beyond = np.arange(len(widths), dtype=np.float64), False
    for place, budget in enumerate(budgets):
        N = budget * 8 / widths
        loss = np.array([float(optimal_loss(law, n, D, b)) for n, (b, law) in zip(N, by_width.items(), strict=True)])
        inside = laws.inside(N, D, widths)
        beyond |= not inside.all()
        colour, marker, dashes = series_style(place)
        axes.plot(places, loss, color=colour, linestyle=dashes, linewidth=1.3, label=memory(budget), zorder=3)
        mark(axes, places[inside], loss[inside], marker, colour, size=6.5, zorder=4)
        mark(axes, places[~inside], loss[~inside], marker, colour, hollow=True, size=6.5, zorder=4)
        best = int(np.argmin(loss))
        axes.plot(places[best], loss[best], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=5)
        offset = -13 if place == len(budgets) - 1 > 0 else 13  # the largest budget's line is the lowest
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
        "By the law, not measured: each line is one budget of weight memory, N·B/8 bytes. At each width stands the "
        f"model that fills it (parameters above the point), trained on {amount(D)} tokens split at the law's optimal "
        "fraction. The ring is the best width. Embedding and head count at the same width as the blocks, although they "
        f"keep at least 4 bits: small models at 1 or 2 bits take more memory than this. {evidence.about_law}"
    )
    warnings = ("Hollow points lie outside the sizes, tokens or widths of the law's runs.",) if beyond else ()
    return Drawn(caption, figure, warnings=warnings)


def draw_waste(evidence: Evidence) -> Drawn:
    """Tokens wasted by a fixed fraction over total tokens, for the smallest and the largest size of the law's runs."""
    laws, by_width = evidence.laws, evidence.law_by_width
    if laws is None:
        return Drawn(lacking=LACKING)
    sizes = sorted(set(laws.ranges["n_params"]))
    figure = new_figure(3.3)
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    D = np.geomspace(laws.ranges["tokens"][0], laws.ranges["tokens"][1] * 1.0001, POINTS)
    for axes, N in zip(panels, sizes, strict=True):
        for bits, law in by_width.items():
            share, (colour, _) = 100 * wasted_tokens(law, N, D, RULE, bits), width_style(bits)
            draw_law(
                axes, D, share, laws.inside(N, D, bits), bits_label(bits),
                color=colour, linewidth=1.5, linestyle=width_dash(bits, list(by_width)), zorder=4,
            )  # fmt: skip
        tidy(axes, title=f"{amount(N)} parameters", x="tokens D")
        log_axis(axes, D)
        axes.set_ylim(0, None)
    panels[0].set_ylabel("wasted tokens, % of D", fontsize=8.5, color=INK)
    legend_below(figure, list(panels))
    caption = (
        f"By the law, not measured: the tokens wasted by a QAT fraction of {RULE:.0%}, at the smallest and the largest "
        f"size of the law's runs ({WASTED}). {evidence.about_law}"
    )
    return Drawn(caption, figure)


def _described(evidence: Evidence) -> tuple[RunTable, Floats]:
    """The runs that the laws describe, and their predicted losses; no run without a law."""
    if evidence.laws is None:
        return evidence.rows(), np.array([])
    table = evidence.rows("fp", evidence.laws.scheme, "scratch")
    predicted = quantized_losses(evidence.law_by_width, table)
    first = next(iter(evidence.laws.by_width.values()))  # full precision by the first of laws for one width each
    full = ~table.quantized
    predicted[full] = first.loss(table.column("n_params")[full], table.column("tokens_fp")[full], 0.0, 1.0)
    known = np.isfinite(predicted)
    return table.where(known), predicted[known]


def _groups(table: RunTable) -> Iterator[tuple[str, str, str, NDArray[np.bool_]]]:
    """(label, colour, marker, rows): full precision, then the widths."""
    full = ~table.quantized
    if full.any():
        yield "full precision", INK, "*", full
    for bits in table.widths:
        yield bits_label(bits), *width_style(bits), table.quantized & (table.column("bits") == bits)
