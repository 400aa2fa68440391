"""The rows of a timeline's table."""

from __future__ import annotations

from dataclasses import dataclass

from qatscale.config.amounts import format_amount
from qatscale.config.schema import Phase, RunConfig
from qatscale.schedule.timeline import Timeline


@dataclass(frozen=True)
class Row:
    """One segment in a table: [start, end) in steps and in tokens, the rate of its first and of its last step."""

    phase: Phase
    start_step: int
    end_step: int
    start_tokens: int
    end_tokens: int
    first_rate: float
    last_rate: float
    betas: tuple[float, float]
    weight_decay: float
    bits: float | None
    """Bits of the weights in this segment; None = full precision."""

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `COLUMNS`."""
        steps = self.end_step - self.start_step
        rate = f"{self.first_rate:.3g}"
        if self.last_rate != self.first_rate:
            rate += f" → {self.last_rate:.3g}"
        return (
            self.phase,
            f"{self.start_step:,}",
            f"{self.end_step:,}",
            f"{steps:,}",
            format_amount(self.end_tokens - self.start_tokens),
            format_amount(self.end_tokens),
            rate,
            f"{self.betas[0]:g}, {self.betas[1]:g}",
            f"{self.weight_decay:g}",
            "full" if self.bits is None else f"{self.bits:g} bits",
        )


COLUMNS = (
    "phase", "from step", "to step", "steps", "tokens", "up to token", "learning rate", "betas", "decay", "weights",
)  # fmt: skip


def describe(timeline: Timeline, config: RunConfig) -> list[Row]:
    """The timeline segment by segment."""
    per_step = timeline.tokens_per_step
    return [
        Row(
            phase=segment.phase,
            start_step=segment.start,
            end_step=segment.end,
            start_tokens=segment.start * per_step,
            end_tokens=segment.end * per_step,
            first_rate=segment.learning_rate(segment.start),
            last_rate=segment.learning_rate(segment.end - 1),
            betas=segment.betas,
            weight_decay=segment.weight_decay,
            bits=config.qat.bits if segment.quantized else None,
        )
        for segment in timeline.segments
    ]
