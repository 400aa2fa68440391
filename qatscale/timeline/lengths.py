"""Lengths of warm-ups and cooldowns: from fractions and tokens to optimizer steps, and the errors about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qatscale.errors import UserError


@dataclass(frozen=True)
class Length:
    """A warm-up or a cooldown in optimizer steps, and the setting that asked for it."""

    steps: int
    key: str
    """Dotted, e.g. `schedule.cooldown_fraction`."""
    value: float
    """As the setting has it: a share of `whole`, or tokens."""
    whole: int
    """Steps of the schedule it belongs to."""
    tokens_per_step: int

    @property
    def in_tokens(self) -> bool:
        return self.key.endswith("_tokens")

    def setting_for(self, steps: int) -> str:
        """`key <= value`, the largest setting that makes it at most `steps` long."""
        if steps <= 0:
            return f"{self.key}=0"
        largest = str(steps * self.tokens_per_step) if self.in_tokens else f"{round_down(steps / self.whole):g}"
        return f"{self.key} <= {largest}"


def length_of(
    key: str, fraction: float | None, tokens: int | None, default: float, whole: int, tokens_per_step: int
) -> Length:
    """The length that `{key}_fraction` of `whole` steps, or `{key}_tokens`, or neither (`default`) asks for.

    Rounded to the nearest step. UserError where something was asked for and nothing is left after rounding; only a
    warm-up that nobody asked for by name may vanish so in a short run.
    """
    if tokens is not None:
        length = Length(round(tokens / tokens_per_step), f"{key}_tokens", tokens, whole, tokens_per_step)
    else:
        share = default if fraction is None else fraction
        length = Length(round(share * whole), f"{key}_fraction", share, whole, tokens_per_step)
    by_default_only = fraction is None and tokens is None
    if length.steps == 0 and length.value > 0 and not (by_default_only and key.endswith("warmup")):
        if length.in_tokens:
            said, least = f"less than one optimizer step of {tokens_per_step} tokens.", str(tokens_per_step)
        else:
            said, least = f"rounds to no optimizer step of {whole}.", f"{round_up(1 / whole):g}"
        raise UserError(length.key, length.value, said, f"Set {length.key}=0 for none, or at least {least}.")
    return length


def check_fit(lengths: Sequence[Length], steps: int, where: str, other_mends: Sequence[str] = ()) -> None:
    """UserError where `lengths` together are longer than the `steps` of `where`, with each setting that mends it."""
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
    raise UserError(
        blamed.key,
        blamed.value,
        f"{parts} steps do not fit into the {steps} steps of {where}.",
        f"Set {', or '.join([*mends, *other_mends])}.",
    )


def round_down(share: float, digits: int = 4) -> float:
    """The largest number of `digits` significant digits that is not above `share`: safe to print as an upper bound."""
    unit = 10.0 ** (math.floor(math.log10(share)) - digits + 1)
    return float(f"{math.floor(share / unit + 1e-9) * unit:.{digits}g}")


def round_up(share: float, digits: int = 4) -> float:
    """The smallest number of `digits` significant digits that is not below `share`: safe to print as a lower bound."""
    unit = 10.0 ** (math.floor(math.log10(share)) - digits + 1)
    return float(f"{math.ceil(share / unit - 1e-9) * unit:.{digits}g}")
