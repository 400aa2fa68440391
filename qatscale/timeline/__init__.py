"""The timeline of a run: a RunConfig becomes segments of steps with their rate, AdamW settings and precision."""

from qatscale.timeline.fraction import nearest_fraction
from qatscale.timeline.segments import (
    Segment,
    SettingsDifference,
    StepSettings,
    Timeline,
    first_difference,
    kept_steps,
)
from qatscale.timeline.show import COLUMNS, describe, draw
from qatscale.timeline.timeline import build_timeline

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
