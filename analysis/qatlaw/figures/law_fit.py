"""How the law meets its runs: predicted against measured loss, and the residuals over what the law reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qatlaw.figures.evidence import Drawn, Evidence
from qatlaw.figures.style import (
    INK,
    SOFT,
    bits_label,
    legend_below,
    log_axis,
    new_figure,
    tidy,
    width_style,
)
from qatlaw.fit import quality, quality_per_bits, robust_spread
from qatlaw.laws.base import Law
from qatlaw.laws.points import Floats
from qatlaw.table import RunTable

LACKING = "a loss law: runs enough to fit one (`qatscale fit` says what is missing), or a fit.json by --law."
FULL = ("#222222", "*")
"""Full-precision runs."""


def draw_agreement(evidence: Evidence) -> Drawn:
    """Law against measurement."""
    name, title = "law_against_measurement", "Law against measurement"
    if evidence.laws is None:
        return Drawn(name, title, "", lacking=LACKING)
    table, predicted = _described(evidence)
    if not len(table):
        return Drawn(name, title, "", lacking="runs that the law describes: of its scheme and bit widths.")
    figure = new_figure(4.6, 6.0)
    axes = figure.add_subplot()
    ends = np.array([min(predicted.min(), table.loss.min()), max(predicted.max(), table.loss.max())])
    ends += np.array([-0.04, 0.04]) * max(float(np.ptp(ends)), 0.02)
    axes.plot(ends, ends, color=SOFT, linewidth=1, zorder=2)
    by_width = quality_per_bits(predicted, table)
    for label, colour, marker, rows in _groups(table):
        found = by_width["fp" if label == "full precision" else label]
        told = label if label == "full precision" else bits_label(float(label))
        axes.plot(
            table.loss[rows], predicted[rows], marker, color=colour, markersize=4, markeredgecolor="white",
            markeredgewidth=0.3, linestyle="none", alpha=0.75, label=f"{told}: MAE {found.mae:.2g}", zorder=4,
        )  # fmt: skip
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_aspect("equal")
    tidy(axes, x="measured validation loss (nats per token)", y="loss by the law (nats per token)")
    legend_below(figure, [axes], columns=3)
    total = quality(predicted, table.loss)
    caption = (
        f"Each point is one of {total.runs} runs; on the line, law and measurement agree. R² {total.r2:.4f}, mean "
        f"absolute error {total.mae:.3g} nats in sample. A high R² says nothing of the optimal fraction, whose "
        f"U-curves are shallow: see the optimal fraction's own figure. {evidence.law_told}"
    )
    return Drawn(name, title, caption, figure)


def draw_residuals(evidence: Evidence) -> Drawn:
    """Residuals over size, tokens, width and fraction: a trend in any of them is what the law misses."""
    name, title = "residuals", "Residuals"
    if evidence.laws is None:
        return Drawn(name, title, "", lacking=LACKING)
    table, predicted = _described(evidence)
    if not len(table):
        return Drawn(name, title, "", lacking="runs that the law describes: of its scheme and bit widths.")
    residuals = 100 * np.log(predicted / table.loss)
    spread = robust_spread(residuals)
    figure = new_figure(5.2)
    panels = figure.subplots(2, 2, sharey=True)
    widths = table.widths
    places = {bits: i + 1 for i, bits in enumerate(widths)}
    place = np.where(table.quantized, [places.get(b, 0) for b in table.column("bits").tolist()], 0.0)
    rng = np.random.default_rng(0)
    place = place + rng.uniform(-0.22, 0.22, len(place))  # runs of one width lie over each other otherwise
    axes_values = (
        (panels[0, 0], table.column("n_params"), "parameters N"),
        (panels[0, 1], table.tokens_total, "tokens D"),
        (panels[1, 0], place, "weights"),
        (panels[1, 1], table.column("tokens_qat") / table.tokens_total, "QAT fraction f"),
    )
    for axes, values, label in axes_values:
        axes.axhspan(-spread, spread, color=SOFT, alpha=0.13, linewidth=0, zorder=1)
        axes.axhline(0, color=SOFT, linewidth=1, zorder=2)
        for told, colour, marker, rows in _groups(table):
            shown = told if told == "full precision" else bits_label(float(told))
            axes.plot(
                values[rows], residuals[rows], marker, color=colour, markersize=6 if marker == "*" else 3.8,
                markeredgecolor="white", markeredgewidth=0.3, linestyle="none", alpha=0.85, label=shown, zorder=4,
            )  # fmt: skip
        tidy(axes, x=label)
    log_axis(panels[0, 0], "x", table.column("n_params"))
    log_axis(panels[0, 1], "x", table.tokens_total)
    panels[1, 0].set_xticks([0, *places.values()], ["full", *map(bits_label, widths)])
    for axes in panels[:, 0]:
        axes.set_ylabel("ln(law / measured), %", fontsize=8.5, color=INK)
    reach = 1.15 * float(np.quantile(np.abs(residuals), 0.995)) or 1.0
    panels[0, 0].set_ylim(-reach, reach)
    beyond = int(np.count_nonzero(np.abs(residuals) > reach))
    legend_below(figure, list(panels.flat), columns=6)
    caption = (
        "What the law misses of each run's loss, in per cent; above zero the law is too high. The band is ± one "
        f"standard deviation of the residuals ({spread:.2g} %, robust). A trend along an axis is structure that the "
        f"law does not have. Over the weights, points are spread sideways to be seen. {evidence.law_told}"
    )
    if beyond:
        caption += f" {beyond} run{'s lie' if beyond > 1 else ' lies'} beyond the axis."
    return Drawn(name, title, caption, figure)


def _described(evidence: Evidence) -> tuple[RunTable, Floats]:
    """The runs that the laws describe, and what they predict for them."""
    laws = evidence.laws
    assert laws is not None
    table = evidence.rows("fp", laws.scheme, "scratch")
    columns = [table.column(name) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")]
    predicted = np.full(len(table), np.nan)
    parts: list[tuple[Law | None, NDArray[np.bool_]]] = [
        (laws.any, ~table.quantized)
    ]  # of laws for one width each, the first one's full-precision part
    parts += [(laws.of(bits), table.quantized & (columns[3] == bits)) for bits in table.widths]
    for law, rows in parts:
        if law is not None and (rows := rows & law.form.describes(table.points)).any():
            predicted[rows] = law.loss(*(column[rows] for column in columns))
    known = np.isfinite(predicted)
    return table.where(known), predicted[known]


def _groups(table: RunTable):  # type: ignore[no-untyped-def]
    """(label, colour, marker, rows): full precision, then the widths."""
    full = ~table.quantized
    if full.any():
        yield "full precision", *FULL, full
    for bits in table.widths:
        yield f"{bits:g}", *width_style(bits), table.quantized & (table.column("bits") == bits)
