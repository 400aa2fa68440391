"""The `schedule` section of a recipe, and the shapes of a cooldown in one table.

A shape says how the learning rate falls; x in [0, 1] is the progress inside the cooldown. Sources: arXiv 2405.18392
(1-sqrt), arXiv 2508.01483 (the family and its comparison).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from qatscale.config.amounts import Tokens
from qatscale.config.section import Beta, ClashError, Fraction, Section, one_length


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
_FORMULAS = "; ".join(f"{name}: {shape.formula}" for name, shape in SHAPES.items())
_OTHER_NAMES = "; ".join(f"{', '.join(s.aliases)}: other names of {name}" for name, s in SHAPES.items() if s.aliases)
Phase = Literal["warmup", "stable", "cooldown", "qat_warmup", "qat_stable", "qat_cooldown"]
ShapeName = Annotated[
    Literal[*NAMES],  # type: ignore[valid-type]  # as many as the table has
    AfterValidator(lambda name: ALIASES.get(name, name)),
    Field(description=f"Curve of the cooldown at progress x from 0 to 1: {_FORMULAS}. {_OTHER_NAMES}."),
]


class PhaseOverride(Section):
    """AdamW settings that hold in one phase only."""

    betas: tuple[Beta, Beta] | None = None
    """AdamW's betas in this phase; null = optimizer.betas."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """AdamW's weight decay in this phase; null = optimizer.weight_decay."""


class ScheduleConfig(Section):
    """Warm-up, stable phase, cooldown. Each length is in tokens or a fraction of the schedule it belongs to.

    `fp`, `fused` and `scratch` have one schedule, over all tokens. `sequential` has two: the full-precision phase
    and the QAT phase, each with its own warm-up and cooldown.
    """

    warmup_fraction: Fraction | None = None
    """Length of the linear warm-up as a share of the schedule; 1 % where neither this nor warmup_tokens is given."""
    warmup_tokens: Tokens | None = None
    """Length of the warm-up in tokens, instead of warmup_fraction."""
    cooldown_fraction: Fraction | None = None
    """Length of the cooldown, in which the rate falls, as a share of the schedule; 0 = none, for a trunk of branches.
    Where neither this nor cooldown_tokens is given: 20 %, or what the warm-up leaves."""
    cooldown_tokens: Tokens | None = None
    """Length of the cooldown in tokens, instead of cooldown_fraction."""
    shape: ShapeName = "1-sqrt"
    """Curve of the rate in the cooldown; `sqrt` and `minus_sqrt` are other names of 1-sqrt."""
    exponent: Annotated[float, Field(gt=0)] = 0.5
    """For shape 1-sqrt: the rate falls as 1 - x^exponent."""
    lowered_to: Annotated[float, Field(gt=0, le=1)] = 0.7
    """For shape lowered_linear: the share of the rate that it drops to at the start."""
    knots: list[Fraction] | None = None
    """For shape piecewise: shares of the rate at equally spaced points, from the cooldown's start to its end."""
    min_lr_ratio: Fraction = 0.0
    """Rate at the end of the cooldown, as a share of the peak."""
    phases: dict[Phase, PhaseOverride] = Field({})
    """AdamW's betas and weight decay in single phases: `schedule.phases.cooldown.betas=[0.9,0.99]`."""

    @model_validator(mode="after")
    def _fits_shape(self) -> Self:
        for what in ("warmup", "cooldown"):
            one_length(self, "schedule", f"{what}_fraction", f"{what}_tokens")
        if self.shape == "exponential" and self.min_lr_ratio == 0:
            raise ClashError("min_lr_ratio", "shape 'exponential' never reaches 0", "Set it above 0, e.g. to 0.01.")
        if self.shape == "piecewise" and self.knots is None:
            raise ClashError("knots", "shape 'piecewise' needs knots", "Set them, e.g. schedule.knots=[1,0.5,0].")
        if self.shape != "piecewise" and self.knots is not None:
            raise ClashError("knots", f"shape {self.shape!r} has no knots", "Set schedule.shape=piecewise.")
        if self.knots is not None and len(self.knots) < 2:
            raise ClashError("knots", "a piecewise cooldown has a start and an end", "Give at least two: [1,0].")
        return self
