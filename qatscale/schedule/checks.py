"""Warnings about what a configuration allows but hardly means: settings without an effect, traps of AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from qatscale.config.schedule_section import SHAPES, ScheduleConfig
from qatscale.config.schema import RunConfig, Scheme
from qatscale.schedule.timeline import Segment, cooldown_of

NOTICEABLE = 0.8
"""Share of an update that is left under Adam's bias correction, below which a change of beta2 is reported."""


def warnings_of(config: RunConfig, segments: Sequence[Segment], switch_step: int | None) -> list[str]:
    names, why = _UNUSED[config.qat.scheme]
    return [
        *_no_effect(config, _changed(config, "qat", names), why),
        *_schedule_without_effect(config, segments),
        *_rate_jump(config),
        *_floor_of_knots(config.schedule),
        *_late_beta2(config, segments, switch_step),
    ]


def _changed(config: RunConfig, prefix: str, names: Sequence[str]) -> list[str]:
    """The dotted keys among `names` whose value is not the default."""
    section = getattr(config, prefix)
    fields = type(section).model_fields
    return [f"{prefix}.{name}" for name in names if getattr(section, name) != fields[name].default]


def _no_effect(config: RunConfig, keys: Sequence[str], why: str) -> list[str]:
    """A line about the keys that a person set."""
    if config._given is not None:
        given = tuple(f"{key}." for key in config._given)
        keys = [key for key in keys if f"{key}.".startswith(given) or any(one.startswith(f"{key}.") for one in given)]
    return [f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect: {why}"] if keys else []


_SECOND_PHASE = ("warmup_fraction", "warmup_tokens", "cooldown_fraction", "optimizer_state")
_UNUSED: dict[Scheme, tuple[tuple[str, ...], str]] = {
    "fp": (
        ("bits", "learning_rate", "lr_ratio", "scale_lr_ratio", "scale_gradient_factor", *_SECOND_PHASE),
        "qat.scheme=fp trains without quantization; for QAT set qat.scheme",
    ),
    "scratch": (_SECOND_PHASE, "qat.scheme=scratch quantizes from step 0, with the lengths of `schedule`"),
    "fused": (("cooldown_fraction",), "qat.scheme=fused has one cooldown, that of `schedule`"),
    "sequential": ((), ""),
}
"""Keys of `qat` without effect under a scheme, and why. A recipe's fraction is for its other schemes; one from the
command line is refused."""


def _schedule_without_effect(config: RunConfig, segments: Sequence[Segment]) -> list[str]:
    schedule = config.schedule
    present = [segment.phase for segment in segments]
    used = [own for phase, own in schedule.phases.items() if phase in present]  # recipes give both cooldowns the same
    absent = [
        f"schedule.phases.{phase}" for phase, own in schedule.phases.items() if phase not in present and own not in used
    ]
    lines = _no_effect(config, absent, f"the phases of this run are {', '.join(present)}")
    if segments[-1].kind != "cooldown":
        lines += _no_effect(config, _changed(config, "data", ["cooldown_seed"]), "this run ends without a cooldown")
    if not any(segment.kind == "cooldown" for segment in segments):
        names = ["shape", "min_lr_ratio", *(shape.setting for shape in SHAPES.values() if shape.setting)]
        keys = _changed(config, "schedule", list(dict.fromkeys(names)))
        return lines + _no_effect(config, keys, "this run has no cooldown")
    for owner, shape in SHAPES.items():
        if owner != schedule.shape and shape.lifted and shape.setting is not None:
            keys = _changed(config, "schedule", [shape.setting])
            lines += _no_effect(config, keys, f"it belongs to shape {owner}, and the shape is {schedule.shape}")
    return lines


def _rate_jump(config: RunConfig) -> list[str]:
    qat, before = config.qat, config.optimizer.learning_rate
    if qat.learning_rate is not None:
        setting, after = f"qat.learning_rate={qat.learning_rate:g}", qat.learning_rate
    elif qat.lr_ratio != "auto":
        setting, after = f"qat.lr_ratio={qat.lr_ratio:g}", qat.lr_ratio * before
    else:
        return []
    if qat.scheme != "fused" or after == before:
        return []
    return [
        f"{setting} makes the rate jump from {before:g} to {after:g} at the switch; a fused run as published keeps the "
        "stable rate, and only then does its curve equal that of fp"
    ]


def _floor_of_knots(schedule: ScheduleConfig) -> list[str]:
    cooldown = cooldown_of(schedule)
    if cooldown.shape != "piecewise" or cooldown.floor in (0, cooldown.factor(1)):
        return []
    return [
        f"schedule.knots are shares of the way from min_lr_ratio={cooldown.floor:g} up to the peak, so the cooldown "
        f"ends at {cooldown.factor(1):g} of the peak; end the knots at 0 to end at {cooldown.floor:g}"
    ]


def _late_beta2(config: RunConfig, segments: Sequence[Segment], switch_step: int | None) -> list[str]:
    """Adam divides its second moment by 1 - beta2^t, with t the steps it has counted, whatever beta2 was meanwhile.

    A moment that is warm under the old beta2 is then divided by 1 - new^t instead of 1 - old^t, and each update shrinks
    by sqrt((1 - new^t) / (1 - old^t)), which the logged rate does not show: 0.63 at t = 500 for 0.999 after 0.95. At
    0.91 it made no measured difference (analysis/studies/cooldown-1to1000).
    """
    lines = []
    for before, after in pairwise(segments):
        old, new = before.betas[1], after.betas[1]
        restarted = switch_step is not None and config.qat.optimizer_state == "reset" and after.start >= switch_step
        t = after.start - (switch_step or 0) if restarted else after.start
        if new <= old or t == 0 or (shrink := math.sqrt((1 - new**t) / (1 - old**t))) >= NOTICEABLE:
            continue
        lines.append(
            f"beta2 rises from {old:g} to {new:g} where {after.phase} starts, after {t} AdamW steps: bias correction "
            f"scales the first updates by {shrink:.2f}, which the logged rate does not show; raise it later, less, or "
            f"from the start (schedule.phases.{after.phase}.betas)"
        )
    return lines
