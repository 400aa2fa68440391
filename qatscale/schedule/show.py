"""The rows of a timeline's table."""

from __future__ import annotations

from qatlaw.bit_widths import bits_label
from qatscale.config.amounts import format_amount
from qatscale.config.schema import RunConfig
from qatscale.schedule.timeline import Timeline

COLUMNS = (
    "phase", "from step", "to step", "steps", "tokens", "up to token", "learning rate", "betas", "decay", "weights",
)  # fmt: skip


def describe(timeline: Timeline, config: RunConfig) -> list[tuple[str, ...]]:
    """One row per segment, as text, in the order of `COLUMNS`. The rate is that of its first and of its last step."""
    rows: list[tuple[str, ...]] = []
    for segment in timeline.segments:
        first, last = (f"{segment.learning_rate(step):.3g}" for step in (segment.start, segment.end - 1))
        rows.append(
            (
                segment.phase,
                f"{segment.start:,}",
                f"{segment.end:,}",
                f"{segment.steps:,}",
                format_amount(segment.steps * timeline.tokens_per_step),
                format_amount(segment.end * timeline.tokens_per_step),
                first if first == last else f"{first} → {last}",
                f"{segment.betas[0]:g}, {segment.betas[1]:g}",
                f"{segment.weight_decay:g}",
                bits_label(config.qat.bits) if segment.quantized else "full",
            )
        )
    return rows
