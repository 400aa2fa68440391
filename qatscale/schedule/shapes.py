"""The shapes of a cooldown: how the learning rate falls, each readable as its formula.

x in [0, 1] is the progress inside the cooldown. A shape is 1 where the full rate holds and 0 where none is left; with
the floor r = `min_lr_ratio` the rate is `peak * (r + (1 - r) * shape(x))`. Sources: arXiv 2405.18392 (1-sqrt),
arXiv 2508.01483 (the family and its comparison).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qatscale.config.schema import ScheduleConfig
from qatscale.errors import UserError, did_you_mean

ALIASES = {"sqrt": "1-sqrt", "minus_sqrt": "1-sqrt"}
SHAPES = ("linear", "cosine", "mirror_cosine", "1-sqrt", "1-square", "lowered_linear", "exponential", "piecewise")


def linear(x: float) -> float:
    return 1 - x


def cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def mirror_cosine(x: float) -> float:
    """The cosine mirrored at the straight line: below it first, above it later."""
    return 2 * (1 - x) - (1 + math.cos(math.pi * x)) / 2


def one_minus_sqrt(x: float, exponent: float = 0.5) -> float:
    return 1 - x**exponent


def one_minus_square(x: float) -> float:
    return 1 - x**2


def lowered_linear(x: float, lowered_to: float = 0.7) -> float:
    """A straight line from p = `lowered_to`: the rate drops to p of the peak where the cooldown starts."""
    return lowered_to * (1 - x)


def piecewise(x: float, knots: Sequence[float]) -> float:
    """Straight lines between `knots`, which are equally spaced in x."""
    position = x * (len(knots) - 1)
    left = min(int(position), len(knots) - 2)
    share = position - left
    return knots[left] * (1 - share) + knots[left + 1] * share


def exponential_factor(x: float, floor: float) -> float:
    """r^x: from 1 to the floor r in equal ratios. The whole factor, not a shape: it never reaches 0."""
    return floor**x


@dataclass(frozen=True)
class Cooldown:
    """A cooldown shape by name, with its settings; an alias is replaced by the name it stands for.

    UserError for an unknown name, for an exponential without a floor, for a piecewise without two knots.
    """

    shape: str = "1-sqrt"
    exponent: float = 0.5
    lowered_to: float = 0.7
    knots: tuple[float, ...] = ()
    floor: float = 0.0
    """min_lr_ratio: the factor where the shape is 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", ALIASES.get(self.shape, self.shape))
        if self.shape not in SHAPES:
            raise UserError("schedule.shape", self.shape, "no such cooldown shape.", did_you_mean(self.shape, SHAPES))
        if self.shape == "exponential" and self.floor <= 0:
            raise UserError(
                "schedule.min_lr_ratio",
                self.floor,
                "shape 'exponential' never reaches 0.",
                "Set it above 0, e.g. 0.01.",
            )
        if self.shape == "piecewise" and len(self.knots) < 2:
            raise UserError("schedule.knots", list(self.knots), "a piecewise cooldown has at least a start and an end.")

    def factor(self, x: float) -> float:
        """The rate as a share of the peak, at progress x in [0, 1]."""
        assert 0 <= x <= 1, x
        if self.shape == "exponential":
            return exponential_factor(x, self.floor)
        return self.floor + (1 - self.floor) * self._shape(x)

    def _shape(self, x: float) -> float:
        match self.shape:
            case "linear":
                return linear(x)
            case "cosine":
                return cosine(x)
            case "mirror_cosine":
                return mirror_cosine(x)
            case "1-sqrt":
                return one_minus_sqrt(x, self.exponent)
            case "1-square":
                return one_minus_square(x)
            case "lowered_linear":
                return lowered_linear(x, self.lowered_to)
            case "piecewise":
                return piecewise(x, self.knots)
        raise AssertionError(self.shape)


def cooldown_of(schedule: ScheduleConfig) -> Cooldown:
    """The cooldown that a recipe's `schedule` section asks for."""
    return Cooldown(
        shape=schedule.shape,
        exponent=schedule.exponent,
        lowered_to=schedule.lowered_to,
        knots=tuple(schedule.knots or ()),
        floor=schedule.min_lr_ratio,
    )
