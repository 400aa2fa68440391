"""A cooldown: a shape of the table with the value of its setting and the floor that a recipe gives."""

from __future__ import annotations

from dataclasses import dataclass

from qatscale.config.cooldown_shapes import SHAPES
from qatscale.config.schema import ScheduleConfig


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
    """The cooldown that a recipe's `schedule` section asks for."""
    key = SHAPES[schedule.shape].setting
    setting = None if key is None else getattr(schedule, key)
    return Cooldown(schedule.shape, tuple(setting) if isinstance(setting, list) else setting, schedule.min_lr_ratio)
