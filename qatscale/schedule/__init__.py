"""The timeline of a run: a RunConfig becomes segments of steps with their rate, AdamW settings and precision."""

from qatscale.schedule.fraction import nearest_fraction
from qatscale.schedule.segments import (
    Segment,
    SettingsDifference,
    StepSettings,
    Timeline,
    first_difference,
    kept_steps,
)
from qatscale.schedule.show import COLUMNS, describe, draw
from qatscale.schedule.timeline import build_timeline

__all__ = [
    "COLUMNS",
    "Segment",
    "SettingsDifference",
    "StepSettings",
    "Timeline",
    "build_timeline",
    "describe",
    "draw",
    "first_difference",
    "kept_steps",
    "nearest_fraction",
]
