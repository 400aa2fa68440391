"""From a RunConfig to its timeline: the four schemes, the switch, and the errors of lengths that do not fit."""

from __future__ import annotations

from qatscale.config.amounts import format_amount
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
    if config.tokens < config.tokens_per_step:
        step = f"{config.batch.sequences} sequences of {config.data.sequence_length} tokens"
        problem = f"less than one optimizer step, {format_amount(config.tokens_per_step)} ({step})."
        raise UserError("tokens", config.tokens, problem, "Give more tokens, or lower batch.sequences.")
    planned, about_fraction = planned_fraction(config)
    segments, cut = _segments(config, planned)
    switch_step = next((segment.start for segment in segments if segment.quantized), None)
    warnings = (*config._notes, *about_fraction, *cut, *warnings_of(config, segments, switch_step))
    ratio = None if switch_step is None else resolved_lr_ratio(config, planned)
    timeline = Timeline(tuple(segments), config.tokens_per_step, switch_step, planned, ratio, warnings)
    kept_steps(timeline, config.checkpoint.keep_at)  # raises now for a point outside the run, not when training begins
    return timeline


def _segments(config: RunConfig, planned: float) -> tuple[list[Segment], list[str]]:
    """The segments, and notes about defaults that did not fit."""
    steps, rate, scheme = config.steps, config.optimizer.learning_rate, config.qat.scheme
    if scheme in ("fp", "scratch"):
        peak = rate if scheme == "fp" else qat_peak(config, planned)
        (warmup, cooldown), notes = share_out(schedule_lengths(config, steps), steps, "the run")
        return _schedule(config, 0, steps, warmup, cooldown, peak, scheme == "scratch"), notes
    switch, where = _switch_step(config, planned), "the QAT phase"
    shorter, longer = list[str](), list[str]()
    if scheme == "fused":
        share_out(schedule_lengths(config, steps), steps, "the run")  # reports first what fits into no split
        least, most = qat_bounds(config)
        shorter, longer = (_fraction_mends(comparison, least, most, steps) for comparison in ("<=", ">="))
        where += ", which holds the one cooldown of a fused run"
    lengths = full_precision_lengths(config, switch)
    (warmup, *cooldowns), notes = share_out(lengths, switch, "the full-precision phase", shorter)
    (rewarmup, cooldown), qat_notes = share_out(qat_lengths(config, steps - switch), steps - switch, where, longer)
    full_precision = _schedule(config, 0, switch, warmup, sum(cooldowns), rate, False)
    qat = _schedule(config, switch, steps, rewarmup, cooldown, qat_peak(config, planned), True)
    return [*full_precision, *qat], [*notes, *qat_notes]


def _schedule(
    config: RunConfig, start: int, end: int, warmup: int, cooldown: int, peak: float, quantized: bool
) -> list[Segment]:
    """A warm-up, a stable phase and a cooldown over the steps [start, end), without those of no step."""
    inner = [start, start + warmup, end - cooldown, end]
    phases: tuple[Phase, Phase, Phase] = ("warmup", "stable", "cooldown")
    if quantized:
        phases = ("qat_warmup", "qat_stable", "qat_cooldown")
    segments = []
    for phase, first, last in zip(phases, inner[:-1], inner[1:], strict=True):
        own = config.schedule.phases.get(phase, PhaseOverride())
        betas = config.optimizer.betas if own.betas is None else own.betas
        decay = config.optimizer.weight_decay if own.weight_decay is None else own.weight_decay
        if first < last:
            segments.append(Segment(phase, first, last, quantized, peak, betas, decay, cooldown_of(config.schedule)))
    return segments


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
