"""The shapes of a cooldown in one table: how the learning rate falls. Recipes, their documentation and tests read it.

x in [0, 1] is the progress inside the cooldown. Sources: arXiv 2405.18392 (1-sqrt), arXiv 2508.01483 (the family and
its comparison).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CooldownShape:
    """One row. A shape is 1 at the full rate and 0 at rate zero; `schedule.min_lr_ratio` lifts its end."""

    formula: str
    """The function as text, for documentation."""
    function: Callable[..., float]
    """f(x), or f(x, value of `setting`)."""
    setting: str | None = None
    """The key of `schedule` that belongs to this shape."""
    aliases: tuple[str, ...] = ()
    monotone: bool = True
    """Whether the rate never rises, under any setting."""
    lifted: bool = True
    """Whether `min_lr_ratio` lifts its end; otherwise it is used as it is."""


def piecewise(x: float, knots: Sequence[float]) -> float:
    """Straight lines between `knots`, which are equally spaced in x."""
    position = x * (len(knots) - 1)
    left = min(int(position), len(knots) - 2)
    share = position - left
    return knots[left] * (1 - share) + knots[left + 1] * share


SHAPES: dict[str, CooldownShape] = {
    "linear": CooldownShape("1 - x", lambda x: 1 - x),
    "cosine": CooldownShape("(1 + cos(pi x)) / 2", lambda x: (1 + math.cos(math.pi * x)) / 2),
    "mirror_cosine": CooldownShape(  # the cosine mirrored at the straight line: below it first, above it later
        "2 (1 - x) - (1 + cos(pi x)) / 2", lambda x: 2 * (1 - x) - (1 + math.cos(math.pi * x)) / 2
    ),
    "1-sqrt": CooldownShape("1 - x^exponent", lambda x, exponent: 1 - x**exponent, "exponent", ("sqrt", "minus_sqrt")),
    "1-square": CooldownShape("1 - x^2", lambda x: 1 - x**2),
    "lowered_linear": CooldownShape("lowered_to (1 - x)", lambda x, lowered_to: lowered_to * (1 - x), "lowered_to"),
    "exponential": CooldownShape("min_lr_ratio^x", lambda x, floor: floor**x, "min_lr_ratio", lifted=False),
    "piecewise": CooldownShape("straight lines between knots", piecewise, "knots", monotone=False),
}
ALIASES = {alias: name for name, shape in SHAPES.items() for alias in shape.aliases}
NAMES = (*SHAPES, *ALIASES)
DESCRIPTION = (
    f"Curve of the cooldown at progress x from 0 to 1: "
    f"{'; '.join(f'{name}: {shape.formula}' for name, shape in SHAPES.items())}. "
    f"{', '.join(ALIASES)}: other names of 1-sqrt."
)


def canonical(name: str) -> str:
    """The name in the table that an alias stands for."""
    return ALIASES.get(name, name)
