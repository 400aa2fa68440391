"""The figure of a timeline: the learning rate over tokens. Importing it loads Matplotlib, which takes half a second."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from qatlaw.bit_widths import bits_label
from qatlaw.figures.style import new_figure, tidy
from qatlaw.files import write_figure
from qatscale.config.amounts import format_amount
from qatscale.config.schema import RunConfig
from qatscale.schedule.timeline import Segment, Timeline

CURVE_POINTS = 300
"""Points drawn of one warm-up or cooldown."""
# Okabe and Ito's palette: distinct with every common form of colour blindness, and in grey by lightness.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#555555"


def draw(timeline: Timeline, config: RunConfig, path: Path) -> Path:
    """Write the learning rate over tokens as a figure, the QAT span shaded, the switch and each cooldown marked.

    The suffix of `path` chooses the format (.png, .svg, .pdf). Uses no pyplot, so no display and no global state.
    """
    figure = new_figure(3.6, width=8)
    axes = figure.add_subplot()
    tokens, rates = rate_curve(timeline)
    axes.plot(tokens, rates, color=BLUE, linewidth=1.8, solid_joinstyle="round")
    axes.set_xlim(0, timeline.tokens)
    axes.set_ylim(0, max(rates) * 1.06)
    _mark_phases(axes, timeline, config.qat.bits)
    title = f"{config.name}: {config.qat.scheme}, {format_amount(timeline.tokens)} tokens"
    tidy(axes, title, "tokens", "learning rate")
    axes.xaxis.set_major_formatter(lambda value, _: format_amount(value))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, path, dpi=150)
    return path


def rate_curve(timeline: Timeline) -> tuple[list[int], list[float]]:
    """Tokens seen before a step and the rate of that step, dense where the rate moves: what `draw` draws."""
    steps = [step for segment in timeline.segments for step in _drawn_steps(segment)]
    return [step * timeline.tokens_per_step for step in steps], [timeline.at(step).learning_rate for step in steps]


def _drawn_steps(segment: Segment) -> list[int]:
    points = 2 if segment.kind == "stable" else CURVE_POINTS
    last = segment.steps - 1
    return sorted({segment.start + round(last * point / (points - 1)) for point in range(points)})


def _mark_phases(axes: Axes, timeline: Timeline, bits: float) -> None:
    """Shade the quantized span, draw a line at the switch and at each cooldown; the legend says where they lie."""
    per_step = timeline.tokens_per_step
    if timeline.switch_step is not None:
        switch = timeline.switch_step * per_step
        label = f"QAT, {bits_label(bits)}: {timeline.qat_fraction:.1%} of the tokens"
        axes.axvspan(switch, timeline.tokens, color=ORANGE, alpha=0.18, linewidth=0, label=label)
        if switch:
            axes.axvline(switch, color=GREY, linewidth=1, linestyle="--", label=f"switch at {format_amount(switch)}")
    cooldowns = [segment.start * per_step for segment in timeline.segments if segment.kind == "cooldown"]
    where = " and ".join(format_amount(start) for start in cooldowns)
    for index, start in enumerate(cooldowns):
        label = "_" if index else f"cooldown from {where}"  # a label that begins with _ stays out of the legend
        axes.axvline(start, color=GREY, linewidth=1, linestyle=":", label=label)
