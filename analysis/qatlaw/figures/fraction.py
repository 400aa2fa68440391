"""The optimal QAT fraction against tokens per parameter byte: measured, by the closed form and by the law."""

from __future__ import annotations

import numpy as np

from qatlaw import fraction as closed
from qatlaw.figures.evidence import Drawn, Evidence, amounts_told, closed_form_warnings
from qatlaw.figures.style import (
    GRID,
    INK,
    bits_label,
    draw_law,
    legend_below,
    log_axis,
    new_figure,
    tidy,
    width_dash,
    width_style,
)

NAME, TITLE = "optimal_fraction", "Optimal QAT fraction"
POINTS = 300


def draw(evidence: Evidence) -> Drawn:
    """Drawn for any runs: without U-curves it shows the fractions that were run."""
    figure = new_figure(4.0)
    axes = figure.add_subplot()
    quantized = evidence.rows("sequential", "fused")
    S_run = quantized.tokens_total / (quantized.column("n_params") * quantized.column("bits") / 8)
    spans = [np.array(closed.MEASURED_S), S_run]
    _draw_closed_form(axes, min(map(np.min, filter(len, spans))), max(map(np.max, filter(len, spans))))
    _draw_law(axes, evidence)
    used = [curve for curve in evidence.curves if curve.inside]
    for bits in sorted({curve.B for curve in used}):
        own = [curve for curve in used if bits == curve.B]
        S = np.array([closed.tokens_per_parameter_byte(c.N, c.D_total, c.B) for c in own])
        f = np.array([c.optimum for c in own])
        bars = np.nan_to_num(np.array([[c.optimum - c.low for c in own], [c.high - c.optimum for c in own]]))
        colour, marker = width_style(bits)
        axes.errorbar(S, f, bars, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6, zorder=4)
        axes.plot(
            S, f, marker, color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.5,
            linestyle="none", label=f"measured, {bits_label(bits)}", zorder=5,
        )  # fmt: skip
    if not used:
        for bits in sorted(set(quantized.column("bits").tolist())):
            rows = quantized.column("bits") == bits
            colour, marker = width_style(bits)
            axes.plot(
                S_run[rows], (quantized.column("tokens_qat") / quantized.tokens_total)[rows], marker, markersize=6,
                markerfacecolor="white", markeredgecolor=colour, markeredgewidth=1.4, linestyle="none",
                label=f"fraction that was run, {bits_label(bits)}", zorder=5,
            )  # fmt: skip
    log_axis(axes, "x", np.concatenate([span for span in spans if len(span)]))
    axes.set_ylim(0, 1)
    tidy(axes, x="tokens per parameter byte  S = D / (N B / 8)", y="optimal QAT fraction  f* = D_qat / D")
    legend_below(figure, [axes], columns=4)
    return Drawn(NAME, TITLE, _caption(evidence, len(used)), figure, warnings=closed_form_warnings(quantized))


def _draw_closed_form(axes, low: float, high: float) -> None:  # type: ignore[no-untyped-def]
    S = np.geomspace(max(low, 1.05), high, POINTS)
    inside = (closed.MEASURED_S[0] <= S) & (closed.MEASURED_S[1] >= S)
    draw_law(axes, S, closed.optimal_fraction(S), inside, "closed form", color=INK, linewidth=2, zorder=3)  # type: ignore[arg-type]
    error = closed.MEAN_ABSOLUTE_ERROR
    f = closed.optimal_fraction(S[inside])
    axes.fill_between(
        S[inside], f - error, f + error, color=GRID, linewidth=0, zorder=1, label=f"± {error:g}, its mean error"
    )


def _draw_law(axes, evidence: Evidence) -> None:  # type: ignore[no-untyped-def]
    """The law at each width, at the middle size of its runs: f* depends on N and B, not on S alone."""
    laws = evidence.laws
    if laws is None:
        return
    widths = [bits for bits in evidence.widths if laws.of(bits) is not None]
    N = float(np.sqrt(np.prod(laws.ranges["n_params"])))
    for bits in widths:
        law = laws.of(bits)
        assert law is not None
        low, high = laws.ranges["tokens"]
        D = np.geomspace(low / 3, high * 3, POINTS)
        colour, _ = width_style(bits)
        draw_law(
            axes, D / (N * bits / 8), law.optimal_fraction(N, D, bits), laws.inside(N, D, bits),
            f"law, {bits_label(bits)}", color=colour, linewidth=1.4, linestyle=width_dash(bits, widths), zorder=4,
        )  # fmt: skip


def _caption(evidence: Evidence, used: int) -> str:
    told = [
        "Black: the closed form f* = exp(−6.7297 / ln S) of arXiv 2509.22935, with its mean absolute error against "
        "that paper's measured optima in grey; dotted where it extrapolates (S outside 35 to 10⁵)."
    ]
    if used:
        told.append(
            f"Points: minima of {used} measured U-curves, each read off its own runs by a three-parameter fit without "
            "any law, with one standard error from the curves' scatter. A curve whose minimum lies outside of the "
            "fractions that were run shows none."
        )
    else:
        told.append(
            "No U-curve has its minimum inside: that takes three fractions or more at one size, token count and width. "
            "Hollow points are the fractions that were run; they are no optima."
        )
    if evidence.laws is not None:
        N = float(np.sqrt(np.prod(evidence.laws.ranges["n_params"])))
        told.append(
            f"Coloured lines: the law's optimum at {amounts_told(np.array([N]))} parameters; dotted beyond the tokens "
            f"of its runs. {evidence.law_told}"
        )
    return " ".join(told)
