"""The timeline of a run: the settings of each optimizer step, as a pure function of the step and the configuration.

A timeline is a sequence of segments [start, end) in 0-based optimizer steps. Each is a warm-up, a stable phase or a
cooldown, in full precision or quantized. `at(step)` answers from the step alone, so a checkpoint holds a counter and no
scheduler.

The learning rate, with `peak` the rate of the stable phase:

    warm-up of n steps from s:    peak * (step - s + 1) / n     the first step is above 0, the last at the peak
    stable:                       peak
    cooldown of n steps from c:   peak * factor((step - c) / n) the end, factor(1), lies just after the last step

So the cooldown's first step still has the full rate (lowered_linear: the lowered one), and its last step is not wasted
on rate 0. This is the convention of the published WSD code (arXiv 2405.18392). Every warm-up starts at 0, also the one
after the switch: AdamW's moments then come from another forward pass, and a ramp from 0 assumes nothing about them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qatscale.config.schedule_section import SHAPES, Phase, ScheduleConfig
from qatscale.errors import UserError


@dataclass(frozen=True)
class StepSettings:
    phase: Phase
    quantized: bool
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float


@dataclass(frozen=True)
class Cooldown:
    """How the rate falls from the peak."""

    shape: str
    """A name in `SHAPES`."""
    setting: float | tuple[float, ...] | None
    """The value of the shape's own setting, if it has one."""
    floor: float
    """min_lr_ratio: the factor where the shape is 0."""

    def factor(self, x: float) -> float:
        """The rate as a share of the peak, at progress x in [0, 1]."""
        assert 0 <= x <= 1, x
        shape = SHAPES[self.shape]
        value = shape.function(x) if shape.setting is None else shape.function(x, self.setting)
        return self.floor + (1 - self.floor) * value if shape.lifted else value


def cooldown_of(schedule: ScheduleConfig) -> Cooldown:
    key = SHAPES[schedule.shape].setting
    setting = None if key is None else getattr(schedule, key)
    return Cooldown(schedule.shape, tuple(setting) if isinstance(setting, list) else setting, schedule.min_lr_ratio)


@dataclass(frozen=True)
class Segment:
    """The steps [start, end), never empty, in which one formula of the rate and one set of AdamW settings hold."""

    phase: Phase
    start: int
    end: int
    quantized: bool
    peak: float
    betas: tuple[float, float]
    weight_decay: float
    cooldown: Cooldown

    @property
    def steps(self) -> int:
        return self.end - self.start

    @property
    def kind(self) -> str:
        """`warmup`, `stable` or `cooldown`."""
        return self.phase.removeprefix("qat_")

    def learning_rate(self, step: int) -> float:
        done = step - self.start
        match self.kind:
            case "warmup":
                return self.peak * ((done + 1) / self.steps)
            case "stable":
                return self.peak
            case _:
                return self.peak * self.cooldown.factor(done / self.steps)

    def to_dict(self) -> dict[str, Any]:
        shared = {name: getattr(self, name) for name in ("phase", "start", "end", "quantized", "weight_decay")}
        rates = [self.learning_rate(step) for step in (self.start, self.end - 1)]
        shape = self.cooldown.shape if self.kind == "cooldown" else None
        return {**shared, "learning_rate": rates, "betas": list(self.betas), "shape": shape}

    def at(self, step: int) -> StepSettings:
        return StepSettings(self.phase, self.quantized, self.learning_rate(step), self.betas, self.weight_decay)


@dataclass(frozen=True)
class Timeline:
    """A run's segments, which partition [0, steps)."""

    segments: tuple[Segment, ...]
    tokens_per_step: int
    switch_step: int | None
    """The first quantized step; 0 for QAT from scratch, None for no QAT."""
    planned_fraction: float
    """The QAT fraction asked for or planned, before rounding to steps."""
    qat_lr_ratio: float | None = None
    """Peak rate of the QAT phase over that of full precision; None for no QAT."""
    warnings: tuple[str, ...] = ()
    """Lines about what is allowed but probably not meant."""

    def __post_init__(self) -> None:
        ends = [0, *(segment.end for segment in self.segments)]
        assert [segment.start for segment in self.segments] == ends[:-1], "segments leave no gap and no overlap"
        assert all(segment.steps > 0 for segment in self.segments), "a segment has at least one step"

    @property
    def steps(self) -> int:
        return self.segments[-1].end

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def qat_steps(self) -> int:
        return 0 if self.switch_step is None else self.steps - self.switch_step

    @property
    def qat_fraction(self) -> float:
        """D_qat / D_total as it is run, after rounding to steps."""
        return self.qat_steps / self.steps

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Steps before which a checkpoint is kept for good: each cooldown's start and the switch, ascending."""
        starts = {segment.start for segment in self.segments if segment.kind == "cooldown"}
        return tuple(sorted((starts | {self.switch_step or 0}) - {0}))

    @property
    def last_cooldown(self) -> int | None:
        """First step of the cooldown that ends the run; None where it ends without one."""
        return self.segments[-1].start if self.segments[-1].kind == "cooldown" else None

    def segment_at(self, step: int) -> Segment:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a run of {self.steps} steps (0-based)")
        return self.segments[bisect_right(self.segments, step, key=lambda segment: segment.start) - 1]

    def at(self, step: int) -> StepSettings:
        """The settings of the 0-based optimizer step `step`. IndexError outside [0, steps)."""
        return self.segment_at(step).at(step)

    def to_dict(self) -> dict[str, Any]:
        """timeline.json, and --json of a dry run. `learning_rate`: that of a segment's first and of its last step."""
        return {
            "steps": self.steps, "tokens": self.tokens, "tokens_per_step": self.tokens_per_step,
            "switch_step": self.switch_step, "planned_fraction": self.planned_fraction,
            "qat_fraction": self.qat_fraction, "qat_lr_ratio": self.qat_lr_ratio, "boundaries": list(self.boundaries),
            "warnings": list(self.warnings), "segments": [segment.to_dict() for segment in self.segments],
        }  # fmt: skip


def kept_steps(timeline: Timeline, keep_at: Iterable[int]) -> tuple[int, ...]:
    """The boundaries and `checkpoint.keep_at`: steps after so many of which a checkpoint is kept for good, ascending.

    keep_at: tokens from the start, rounded to the nearest step. UserError where one rounds to 0 or lies beyond the end.
    """
    kept = set(timeline.boundaries)
    for tokens in keep_at:
        step = round(tokens / timeline.tokens_per_step)
        if not 0 < step <= timeline.steps:
            size = f"{timeline.tokens} tokens in steps of {timeline.tokens_per_step}"
            problem = f"lies outside the run, which has {size}."
            raise UserError("checkpoint.keep_at", tokens, problem, "Take it out, or move it inside.")
        kept.add(step)
    return tuple(sorted(kept))
