"""A measured loss landscape: the folder that `qatscale landscape` writes, its curvatures, and what they say."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qatlaw.bit_widths import bits_label
from qatlaw.errors import InputError, first_invalid
from qatlaw.files import Count, read_small

GRID, PATH, SUMMARY = "grid.csv", "path.csv", "landscape.json"
ENDS = {"before": 0.0, "after": 1.0}
"""x of the two checkpoints, at y = 0."""
_SMOOTH = 0.7
"""Least `smoothness` of what is not called a cusp."""


class _Inputs(BaseModel):
    model_config = ConfigDict(extra="allow")
    before: Annotated[str, Field(pattern=r"step-\d+$")]
    after: Annotated[str, Field(pattern=r"step-\d+$")]
    views: Annotated[list[Literal["fp", "quantized"]], Field(min_length=1, max_length=2)]
    bits: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    points: Count


class _File(BaseModel):
    """landscape.json."""

    inputs: _Inputs
    axes: dict[str, Any]


@dataclass(frozen=True)
class Curvature:
    """Second differences of the loss at a point, with the grid's spacing, in nats per squared unit."""

    along: float
    across: float
    mixed: float

    @property
    def ratio(self) -> float:
        """Across over along; not finite where the loss is not convex along the line."""
        return self.across / self.along if self.along > 0 else math.inf

    @property
    def valley_angle(self) -> float:
        """Degrees between the line and the direction of the least curvature, in (−90, 90]."""
        if not math.isfinite(self.along + self.across + self.mixed):
            return math.nan
        _, directions = np.linalg.eigh([[self.along, self.mixed], [self.mixed, self.across]])
        x, y = directions[:, 0]  # eigenvalues ascend
        angle = math.degrees(math.atan2(y, x))
        return angle - 180 if angle > 90 else angle + 180 if angle <= -90 else angle


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid of a plane in weight space."""

    inputs: Mapping[str, Any]
    axes: Mapping[str, Any]
    """`unit`: the distance between the checkpoints, 1 on both axes; `adam_step`: Adam's last step before, in units;
    `adam_cosine`: of the angle between that step and the line."""
    grid: pd.DataFrame
    """x, y and a column per view."""
    path: pd.DataFrame | None
    """step, x, y, distance from the plane in units, and the checkpoint's own loss in each view."""

    @property
    def views(self) -> list[str]:
        return list(self.inputs["views"])

    @property
    def title(self) -> str:
        """RUN@STEP to RUN@STEP."""
        ends = (Path(self.inputs[end]) for end in ENDS)
        return " to ".join(f"{end.parent.parent.name}@{int(end.name.removeprefix('step-'))}" for end in ends)

    def label(self, view: str) -> str:
        return "full precision" if view == "fp" else f"quantized, {bits_label(self.inputs['bits'])}"

    def surface(self, view: str) -> pd.DataFrame:
        """Losses of a view; index y, columns x, both ascending."""
        return self.grid.pivot(index="y", columns="x", values=view)

    def curvature(self, view: str, x: float, steps: int = 1) -> Curvature | None:
        """At (x, 0), from neighbours so many steps of the grid away; None where the grid ends before them."""
        surface = self.surface(view)
        columns, rows = surface.columns, surface.index
        column, row = columns.get_loc(x), rows.get_loc(0.0)
        if steps > min(column, len(columns) - 1 - column, row):
            return None
        near = surface.to_numpy()[row - steps : row + steps + 1 : steps, column - steps : column + steps + 1 : steps]
        dx, dy = columns[column + steps] - x, rows[row + steps]
        return Curvature(
            along=float((near[1, 2] - 2 * near[1, 1] + near[1, 0]) / dx**2),
            across=float((near[2, 1] - 2 * near[1, 1] + near[0, 1]) / dy**2),
            mixed=float((near[2, 2] - near[2, 0] - near[0, 2] + near[0, 0]) / (4 * dx * dy)),
        )

    @cached_property
    def summary(self) -> dict[str, Any]:
        """By view: the loss and the curvature at both ends, and the lowest point.

        `smoothness`: curvature across at twice the spacing over that at the grid's: 1 in a parabola, ½ in a cusp |y|.
        """
        return {view: self._summary(view) for view in self.views}

    def _summary(self, view: str) -> dict[str, Any]:
        surface = self.surface(view)
        lowest = self.grid.loc[self.grid[view].idxmin()]
        found: dict[str, Any] = {"lowest": {"x": lowest["x"], "y": lowest["y"], "loss": lowest[view]}}
        for end, x in ENDS.items():
            curvature, wider = self.curvature(view, x), self.curvature(view, x, 2)
            assert curvature is not None
            smoothness = wider.across / curvature.across if wider and curvature.across else None
            derived = {"ratio": curvature.ratio, "valley_angle": curvature.valley_angle, "smoothness": smoothness}
            found[end] = {"loss": surface.loc[0.0, x], **asdict(curvature), **derived}
        return found

    @property
    def findings(self) -> list[str]:
        """What is seen, in a sentence or two per view."""
        found = [_finding(self.label(view), self.summary[view]) for view in self.views]
        if len(self.views) == 2:
            one, other = (self.summary[view]["after"]["valley_angle"] for view in self.views)
            apart = abs(one - other)
            found.append(f"The flattest directions of both views lie {min(apart, 180 - apart):.0f}° apart at AFTER.")
        return found


def _finding(label: str, found: Mapping[str, Any]) -> str:
    after, change = found["after"], found["after"]["loss"] - found["before"]["loss"]
    moves = f"{label}: the loss {'rises' if change > 0 else 'falls'} by {abs(change):.3f} nats from BEFORE to AFTER."
    if after["across"] <= 0:
        return f"{moves} At AFTER it does not curve upwards across the line: no valley at this resolution."
    curves = f"{after['ratio']:.3g} times as much across the line as along it" if after["along"] > 0 else "across only"
    angle, smoothness = abs(after["valley_angle"]), after["smoothness"]
    seen = f"{moves} At AFTER it curves {curves}; the flattest direction lies {angle:.0f}° off the line."
    if smoothness is None or smoothness > _SMOOTH:
        return seen
    return f"{seen} It has a cusp there: at twice the spacing the curvature across falls to {smoothness:.2g} of that."


def read_landscape(folder: Path) -> Landscape:
    """InputError, with the file, where one is damaged or the grid is not complete."""
    file = SUMMARY
    try:
        known = _File.model_validate_json(read_small(folder / file), strict=True)
        file = PATH
        path = _numbers(folder / file) if (folder / file).is_file() else None
        file = GRID
        grid = _numbers(folder / file)
        found = Landscape(known.inputs.model_dump(), known.axes, grid, path)
        if not (lacking := known.inputs.points - len(grid)):
            _ = found.summary  # raises where the points are not a grid around both ends
    except (OSError, ValueError, KeyError, AssertionError) as error:
        invalid = first_invalid(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        problem = f"cannot be read: {invalid or 'it holds other points'}."
        raise InputError("landscape", str(folder / file), problem, "Measure it again in another folder.") from None
    if lacking:
        raise InputError("landscape", str(folder), f"lacks {lacking} points.", "Run `qatscale landscape` again.")
    return found


def _numbers(path: Path) -> pd.DataFrame:
    """A table of numbers at places x, y. ValueError or KeyError where it is another one."""
    frame = pd.read_csv(io.BytesIO(read_small(path))).astype(np.float64)
    if not np.isfinite(frame[["x", "y"]]).all(axis=None):
        raise ValueError("a place is not finite")
    return frame
