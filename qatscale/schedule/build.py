"""From a RunConfig to its timeline: the four schemes, the switch, and the errors of lengths that do not fit."""

from __future__ import annotations

from dataclasses import dataclass

from qatscale.config.schedule_section import Phase, PhaseOverride
from qatscale.config.schema import RunConfig
from qatscale.errors import UserError
from qatscale.schedule.checks import warnings_of
from qatscale.schedule.fraction import check_two_phases, planned_fraction, qat_bounds
from qatscale.schedule.lengths import (
    full_precision_lengths,
    qat_lengths,
    round_down,
    round_up,
    schedule_lengths,
    share_out,
)
from qatscale.schedule.rates import qat_peak, resolved_lr_ratio
from qatscale.schedule.timeline import Segment, Timeline, cooldown_of, kept_steps


def build_timeline(config: RunConfig) -> Timeline:
    """The timeline of a run.

    - `fp`: warm-up, stable, cooldown over all steps.
    - `scratch`: the same, quantized from step 0, at the QAT rate.
    - `sequential`: a complete schedule up to the switch, then a second one with a re-warm-up; fractions are of each.
    - `fused`: warm-up and stable in full precision; QAT takes over at the stable rate (after a re-warm-up if one is
      asked for) and holds the one cooldown. Fractions are of all steps, so that the curve is that of `fp`.

    The switch lies at round((1 - f) * steps). UserError where a length does not fit, f leaves a phase without a step,
    or `checkpoint.keep_at` lies outside the run.
    """
    planned, about_fraction = planned_fraction(config)
    schedules = _schedules(config, planned)
    segments = tuple(segment for schedule in schedules for segment in schedule.segments(config))
    switch_step = next((schedule.start for schedule in schedules if schedule.quantized), None)
    cut = (note for schedule in schedules for note in schedule.notes)
    warnings = (*config._notes, *about_fraction, *cut, *warnings_of(config, segments, switch_step))
    ratio = None if switch_step is None else resolved_lr_ratio(config, planned)
    timeline = Timeline(segments, config.tokens_per_step, switch_step, planned, ratio, warnings)
    kept_steps(timeline, config.checkpoint.keep_at)  # raises now for a point outside the run, not when training begins
    return timeline


@dataclass(frozen=True)
class _Schedule:
    """A warm-up, a stable phase and a cooldown over the steps [start, end); each may be empty."""

    start: int
    end: int
    warmup: int
    cooldown: int
    peak: float
    quantized: bool
    notes: tuple[str, ...]
    """About defaults that did not fit."""

    def segments(self, config: RunConfig) -> list[Segment]:
        cooldown = cooldown_of(config.schedule)
        inner = [self.start, self.start + self.warmup, self.end - self.cooldown, self.end]
        phases: tuple[Phase, Phase, Phase] = ("warmup", "stable", "cooldown")
        if self.quantized:
            phases = ("qat_warmup", "qat_stable", "qat_cooldown")
        segments = []
        for phase, start, end in zip(phases, inner[:-1], inner[1:], strict=True):
            own = config.schedule.phases.get(phase, PhaseOverride())
            betas = config.optimizer.betas if own.betas is None else own.betas
            decay = config.optimizer.weight_decay if own.weight_decay is None else own.weight_decay
            if start < end:
                segments.append(Segment(phase, start, end, self.quantized, self.peak, betas, decay, cooldown))
        return segments


def _schedules(config: RunConfig, planned: float) -> list[_Schedule]:
    steps, rate, scheme = config.steps, config.optimizer.learning_rate, config.qat.scheme
    if scheme in ("fp", "scratch"):
        peak = rate if scheme == "fp" else qat_peak(config, planned)
        (warmup, cooldown), notes = share_out(schedule_lengths(config, steps), steps, "the run")
        return [_Schedule(0, steps, warmup, cooldown, peak, scheme == "scratch", tuple(notes))]
    switch, where = _switch_step(config, planned), "the QAT phase"
    shorter, longer = list[str](), list[str]()
    if scheme == "fused":
        share_out(schedule_lengths(config, steps), steps, "the run")  # reports first what fits into no split
        least, most = qat_bounds(config)
        shorter, longer = (_fraction_mends(comparison, least, most, steps) for comparison in ("<=", ">="))
        where += ", which holds the one cooldown of a fused run"
    lengths = full_precision_lengths(config, switch)
    (warmup, *cooldowns), notes = share_out(lengths, switch, "the full-precision phase", shorter)
    (rewarmup, qat_cooldown), qat_notes = share_out(qat_lengths(config, steps - switch), steps - switch, where, longer)
    return [
        _Schedule(0, switch, warmup, sum(cooldowns), rate, False, tuple(notes)),
        _Schedule(switch, steps, rewarmup, qat_cooldown, qat_peak(config, planned), True, tuple(qat_notes)),
    ]


def _fraction_mends(comparison: str, least: int, most: int, steps: int) -> list[str]:
    """`qat.fraction >= y` or `<= y` in so many digits that y itself gives a QAT phase of `least` to `most` steps."""
    if not 0 < least <= most:
        return []  # no switch leaves steps for both phases
    nearest, rounded = (least, round_up) if comparison == ">=" else (most, round_down)
    for digits in range(3, 17):
        share = rounded(nearest / steps, digits)
        if least <= steps - round((1 - share) * steps) <= most:
            return [f"qat.fraction {comparison} {share!r}"]
    return []


def _switch_step(config: RunConfig, planned: float) -> int:
    check_two_phases(config)
    steps = config.steps
    switch = round((1 - planned) * steps)
    if not 0 < switch < steps:
        phase = "QAT" if switch == steps else "full-precision"
        problem = f"{planned:.4g} of {steps} optimizer steps leaves no {phase} step."
        fix = f"The smallest possible is {round_up(1 / steps):g}, the largest is {round_down(1 - 1 / steps, 6):g}."
        raise UserError("qat.fraction", config.qat.fraction, problem, fix)
    return switch
