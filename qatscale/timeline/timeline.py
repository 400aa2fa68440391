"""From a RunConfig to its timeline: the four schemes, the switch, and the errors of lengths that do not fit."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import qatlaw
from qatscale.config.schema import Phase, PhaseOverride, RunConfig
from qatscale.errors import UserError
from qatscale.model.sizes import count_parameters
from qatscale.timeline.checks import warnings_of
from qatscale.timeline.lengths import Length, check_fit, length_of, round_down, round_up
from qatscale.timeline.segments import Segment, Timeline, kept_steps
from qatscale.timeline.shapes import cooldown_of

WARMUP, REWARMUP, COOLDOWN = 0.01, 0.02, 0.2
"""Default shares: the warm-up of a schedule, the re-warm-up of a sequential QAT phase, the cooldown of a schedule."""


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
    planned, extrapolation = planned_fraction(config)
    schedules = _schedules(config, planned)
    segments = tuple(segment for schedule in schedules for segment in schedule.segments(config))
    switch_step = next((schedule.start for schedule in schedules if schedule.quantized), None)
    warnings = (*extrapolation, *warnings_of(config, segments, switch_step))
    timeline = Timeline(segments, config.tokens_per_step, switch_step, planned, warnings)
    kept_steps(timeline, config.checkpoint.keep_at)  # a point outside the run is told now, not when training begins
    return timeline


def planned_fraction(config: RunConfig) -> tuple[float, tuple[str, ...]]:
    """QAT's share of all tokens before rounding, and what is to be said about it.

    `auto` is the planner's optimum with N = all parameters (a tied embedding once), D = `tokens`, B = `qat.bits`: what
    `qatscale plan` answers.
    """
    qat = config.qat
    if qat.scheme in ("fp", "scratch"):
        return float(qat.scheme == "scratch"), ()
    if qat.fraction != "auto":
        return qat.fraction, ()
    params = count_parameters(config.model).total
    try:
        plan = qatlaw.plan_run(params, config.tokens, qat.bits, law=qatlaw.default_law())
    except qatlaw.LawError:
        S = qatlaw.tokens_per_parameter_byte(params, config.tokens, qat.bits)
        raise UserError(
            "qat.fraction",
            "auto",
            f"{config.tokens} tokens over {params} parameters at {qat.bits:g} bits are {S:.3g} tokens per byte, "
            "and the planner's closed form needs more than 1.",
            "Set qat.fraction to a number, or train on more tokens.",
        ) from None
    return plan.fraction, tuple(f"qat.fraction=auto is {plan.fraction:.4f}, but {text}" for text in plan.warnings)


@dataclass(frozen=True)
class _Schedule:
    """A warm-up, a stable phase and a cooldown over the steps [start, end); each may be empty."""

    start: int
    end: int
    warmup: int
    cooldown: int
    peak: float
    quantized: bool

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
    match config.qat.scheme:
        case "fp":
            return [_whole(config, config.optimizer.learning_rate, quantized=False)]
        case "scratch":
            return [_whole(config, _qat_rate(config), quantized=True)]
        case "sequential":
            return _sequential(config, _switch_step(config, planned))
        case "fused":
            return _fused(config, _switch_step(config, planned))


def _whole(config: RunConfig, peak: float, quantized: bool) -> _Schedule:
    warmup, cooldown = _warmup(config, config.steps), _cooldown(config, config.steps)
    check_fit([warmup, cooldown], config.steps, "the run")
    return _Schedule(0, config.steps, warmup.steps, cooldown.steps, peak, quantized)


def _sequential(config: RunConfig, switch: int) -> list[_Schedule]:
    warmup, cooldown = _warmup(config, switch), _cooldown(config, switch)
    check_fit([warmup, cooldown], switch, "the full-precision phase")
    qat_steps = config.steps - switch
    rewarmup, qat_cooldown = _rewarmup(config, qat_steps, REWARMUP), _cooldown(config, qat_steps)
    if config.qat.cooldown_fraction is not None:
        share = config.qat.cooldown_fraction
        qat_cooldown = length_of("qat.cooldown", share, None, COOLDOWN, qat_steps, config.tokens_per_step)
    check_fit([rewarmup, qat_cooldown], qat_steps, "the QAT phase")
    return [
        _Schedule(0, switch, warmup.steps, cooldown.steps, config.optimizer.learning_rate, quantized=False),
        _Schedule(switch, config.steps, rewarmup.steps, qat_cooldown.steps, _qat_rate(config), quantized=True),
    ]


def _fused(config: RunConfig, switch: int) -> list[_Schedule]:
    steps, qat_steps = config.steps, config.steps - switch
    warmup, cooldown = _warmup(config, steps), _cooldown(config, steps)
    rewarmup = _rewarmup(config, qat_steps, default=0)
    least = _shortest_qat(config, cooldown.steps, rewarmup)
    most = min(steps - warmup.steps, steps - 1)
    check_fit([warmup], switch, "the full-precision phase", _fraction_mends("<=", least, most, steps))
    where = "the QAT phase, which holds the one cooldown of a fused run"
    check_fit([rewarmup, cooldown], qat_steps, where, _fraction_mends(">=", least, most, steps))
    return [
        _Schedule(0, switch, warmup.steps, 0, config.optimizer.learning_rate, quantized=False),
        _Schedule(switch, steps, rewarmup.steps, cooldown.steps, _qat_rate(config), quantized=True),
    ]


def _shortest_qat(config: RunConfig, cooldown: int, rewarmup: Length) -> int:
    """Steps of the shortest QAT phase that holds this cooldown and its re-warm-up, which may grow with the phase."""
    if rewarmup.in_tokens:
        return max(1, cooldown + rewarmup.steps)
    # What a re-warm-up of a share of the phase leaves for the cooldown never shrinks as the phase grows: bisect.
    sizes = range(1, config.steps)
    return sizes[0] + bisect_left(sizes, cooldown, key=lambda size: size - round(rewarmup.value * size))


def _fraction_mends(comparison: str, least: int, most: int, steps: int) -> list[str]:
    """`qat.fraction >= y` or `<= y` in so many digits that y itself gives a QAT phase of `least` to `most` steps."""
    if not 0 < least <= most:
        return []  # no switch leaves room for both phases
    nearest, rounded = (least, round_up) if comparison == ">=" else (most, round_down)
    for digits in range(3, 17):
        share = rounded(nearest / steps, digits)
        if least <= steps - round((1 - share) * steps) <= most:
            return [f"qat.fraction {comparison} {share!r}"]
    return []


def _switch_step(config: RunConfig, planned: float) -> int:
    steps = config.steps
    if steps < 2:
        raise UserError(
            "tokens", config.tokens, "one optimizer step is too short for two phases.", "Train on more tokens."
        )
    switch = round((1 - planned) * steps)
    if not 0 < switch < steps:
        phase = "QAT" if switch == steps else "full-precision"
        raise UserError(
            "qat.fraction",
            config.qat.fraction,
            f"{planned:.4g} of {steps} optimizer steps leaves no {phase} step.",
            f"The smallest possible is {round_up(1 / steps):g}, the largest is {round_down(1 - 1 / steps, 6):g}.",
        )
    return switch


def _warmup(config: RunConfig, whole: int) -> Length:
    own = config.schedule
    return length_of("schedule.warmup", own.warmup_fraction, own.warmup_tokens, WARMUP, whole, config.tokens_per_step)


def _cooldown(config: RunConfig, whole: int) -> Length:
    own = config.schedule
    return length_of(
        "schedule.cooldown", own.cooldown_fraction, own.cooldown_tokens, COOLDOWN, whole, config.tokens_per_step
    )


def _rewarmup(config: RunConfig, whole: int, default: float) -> Length:
    own = config.qat
    return length_of("qat.warmup", own.warmup_fraction, own.warmup_tokens, default, whole, config.tokens_per_step)


def _qat_rate(config: RunConfig) -> float:
    return config.qat.learning_rate or config.optimizer.learning_rate
