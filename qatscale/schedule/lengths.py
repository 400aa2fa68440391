"""Lengths of warm-ups and cooldowns: from fractions and tokens to optimizer steps, and how they share a phase.

A length that a recipe gives is kept or refused. A default takes what the given lengths leave.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qatscale.config.schema import RunConfig
from qatscale.errors import UserError

WARMUP, REWARMUP, COOLDOWN = 0.01, 0.02, 0.2
"""Default shares: the warm-up of a schedule, the re-warm-up of a sequential QAT phase, the cooldown of a schedule."""


@dataclass(frozen=True)
class Length:
    """A warm-up or a cooldown in optimizer steps, and the setting that asked for it."""

    steps: int
    key: str
    """Dotted, e.g. `schedule.cooldown_fraction`."""
    value: float
    """The setting: a share of `total`, or tokens."""
    total: int
    """Optimizer steps of the schedule that it belongs to."""
    tokens_per_step: int
    is_default: bool

    @property
    def in_tokens(self) -> bool:
        return self.key.endswith("_tokens")

    @property
    def is_cooldown(self) -> bool:
        return "cooldown" in self.key

    def setting_for(self, steps: int) -> str:
        """`key <= value`, the largest setting that makes it at most `steps` long."""
        if steps <= 0:
            return f"{self.key}=0"
        largest = str(steps * self.tokens_per_step) if self.in_tokens else f"{round_down(steps / self.total):g}"
        return f"{self.key} <= {largest}"


def schedule_lengths(config: RunConfig, total: int) -> tuple[Length, Length]:
    """The warm-up and the cooldown of a schedule of `total` steps."""
    own = config.schedule
    return (
        _length("schedule.warmup", own.warmup_fraction, own.warmup_tokens, WARMUP, total, config),
        _length("schedule.cooldown", own.cooldown_fraction, own.cooldown_tokens, COOLDOWN, total, config),
    )


def full_precision_lengths(config: RunConfig, steps: int) -> list[Length]:
    """The warm-up of a full-precision phase of `steps` steps that QAT follows; and its cooldown, if it has one."""
    if config.qat.scheme == "fused":
        return [schedule_lengths(config, config.steps)[0]]
    return [*schedule_lengths(config, steps)]


def qat_lengths(config: RunConfig, qat_steps: int) -> list[Length]:
    """The re-warm-up and the cooldown of a QAT phase of `qat_steps` steps that follows a full-precision one."""
    own, fused = config.qat, config.qat.scheme == "fused"
    default = 0.0 if fused else REWARMUP
    rewarmup = _length("qat.warmup", own.warmup_fraction, own.warmup_tokens, default, qat_steps, config)
    if fused:  # the one cooldown of the run, whose length does not depend on the switch
        return [rewarmup, schedule_lengths(config, config.steps)[1]]
    if own.cooldown_fraction is None:
        return [rewarmup, schedule_lengths(config, qat_steps)[1]]
    return [rewarmup, _length("qat.cooldown", own.cooldown_fraction, None, COOLDOWN, qat_steps, config)]


def _length(
    key: str, fraction: float | None, tokens: int | None, default: float, total: int, config: RunConfig
) -> Length:
    """The length that `{key}_fraction` of `total` steps, or `{key}_tokens`, or neither (`default`) asks for.

    Rounded to the nearest step.
    """
    per_step = config.tokens_per_step
    if tokens is not None:
        return Length(round(tokens / per_step), f"{key}_tokens", tokens, total, per_step, False)
    share = default if fraction is None else fraction
    return Length(round(share * total), f"{key}_fraction", share, total, per_step, fraction is None)


def share_out(
    lengths: Sequence[Length], steps: int, where: str, other_mends: Sequence[str] = ()
) -> tuple[list[int], list[str]]:
    """The steps of each of `lengths` inside the `steps` of `where`, and notes about defaults that were cut.

    UserError, with each setting that fixes it, where the given lengths together exceed `steps`, or where one of them
    rounds to no step.
    """
    asked = [length for length in lengths if not length.is_default]
    for length in asked:
        _check_rounding(length)
    _check_fit(asked, steps, where, other_mends)
    left = steps - sum(length.steps for length in asked)
    found, notes = [], []
    for length in lengths:
        given = length.steps if not length.is_default else min(length.steps, left)
        left -= given if length.is_default else 0
        found.append(given)
        if given < length.steps:
            notes.append(
                f"the default of {length.key}, {length.value:g} of {length.total} steps, is cut to {given}: no more "
                f"are left of the {steps} steps of {where}"
            )
        elif length.is_cooldown and not given and length.value:
            notes.append(f"the default of {length.key}, {length.value:g}, rounds to no step of {length.total}")
    return found, notes


def shortest_phase(lengths_at: Callable[[int], Sequence[Length]], most: int) -> int:
    """Steps of the shortest phase of up to `most` steps that holds its lengths in full; `most` where none does.

    lengths_at: the lengths of a phase of so many steps. What they leave never shrinks as the phase grows: bisect.
    """

    def holds(steps: int) -> bool:
        lengths = lengths_at(steps)
        vanishes = any(length.steps == 0 and length.value > 0 for length in lengths)
        return not vanishes and sum(length.steps for length in lengths) <= steps

    return 1 + bisect_left(range(1, most), True, key=holds)


def _check_rounding(length: Length) -> None:
    if length.steps > 0 or length.value == 0:
        return
    if length.in_tokens:
        said, least = f"less than one optimizer step of {length.tokens_per_step} tokens.", str(length.tokens_per_step)
    else:
        said, least = f"rounds to no optimizer step of {length.total}.", f"{round_up(1 / length.total):g}"
    raise UserError(length.key, length.value, said, f"Set {length.key}=0 for none, or at least {least}.")


def _check_fit(lengths: Sequence[Length], steps: int, where: str, other_mends: Sequence[str]) -> None:
    total = sum(length.steps for length in lengths)
    if total <= steps:
        return
    blamed = max(lengths, key=lambda length: length.steps)
    parts = " + ".join(f"{length.steps} ({length.key})" for length in lengths if length.steps)
    mends = [
        length.setting_for(left)
        for length in sorted(lengths, key=lambda length: -length.steps)
        if length.steps and (left := steps - (total - length.steps)) >= 0
    ]
    if not mends and not other_mends:
        mends = [" and ".join(f"shorter {length.key}" for length in lengths if length.steps)]
    problem = f"{parts} steps do not fit into the {steps} steps of {where}."
    raise UserError(blamed.key, blamed.value, problem, f"Set {', or '.join([*mends, *other_mends])}.")


def round_down(share: float, digits: int = 4) -> float:
    """The largest number of `digits` significant digits that is not above `share`: safe to print as an upper bound."""
    unit = 10.0 ** (math.floor(math.log10(share)) - digits + 1)
    return float(f"{math.floor(share / unit + 1e-9) * unit:.{digits}g}")


def round_up(share: float, digits: int = 4) -> float:
    """The smallest number of `digits` significant digits that is not below `share`: safe to print as a lower bound."""
    unit = 10.0 ** (math.floor(math.log10(share)) - digits + 1)
    return float(f"{math.ceil(share / unit - 1e-9) * unit:.{digits}g}")
