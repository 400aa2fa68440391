"""A plane through the weights of two checkpoints, and losses on a grid of it. It knows no model: see `landscape`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qatlaw.files import naming
from qatscale.errors import UserError
from qatscale.model.lazy_state import LazyState, State, shapes_of

Losses = Callable[[State, float], Sequence[float]]
"""(weights of a point, its x) → its loss in each view."""
_COLLINEAR = 1e-3
"""Sine of the least angle between the two directions: below it rounding decides what is orthogonal."""


@dataclass(frozen=True)
class Plane:
    """Weights = before + x · along + y · across, where along = after − before, and across is as long.

    across is the part of `step` that is orthogonal to along. In memory are `along` and one row of the grid; `before`
    and `step` may be lazy: they are read again for every row.
    """

    before: State
    step: State
    along: dict[str, Tensor]
    norm: float
    """The distance from before to after: 1 on both axes."""
    step_norm: float
    cosine: float
    """The cosine of the angle between step and along."""

    @classmethod
    def through(cls, before: State, after: State, step: State) -> Plane:
        """UserError where these span no plane."""
        along = {name: after[name] - before[name] for name in before}
        norm = math.sqrt(sum(_dot(value, value) for value in along.values()))
        if norm == 0:
            raise UserError("AFTER", None, "has the weights of BEFORE.", "Give another checkpoint.")
        squares = products = 0.0
        for name, value in along.items():
            part = step[name]
            squares += _dot(part, part)
            products += _dot(part, value)
        cosine = products / math.sqrt(squares) / norm if squares else 1.0
        plane = cls(before, step, along, norm, math.sqrt(squares), cosine)
        if plane._sine < _COLLINEAR:
            problem = "Adam's step there is zero or points along the line."
            raise UserError("BEFORE", None, problem, "Give another checkpoint.")
        return plane

    @property
    def _sine(self) -> float:
        return math.sqrt(max(0.0, 1 - self.cosine**2))

    def across(self, name: str) -> Tensor:
        orthogonal = self.step[name] - self.along[name] * (self.cosine * self.step_norm / self.norm)
        return orthogonal * (self.norm / (self.step_norm * self._sine))

    def row(self, y: float) -> dict[str, Tensor]:
        """The weights at (0, y)."""
        return {name: self.before[name] + y * self.across(name) if y else self.before[name] for name in self.along}

    def point(self, row: State, x: float) -> State:
        """The weights at x of a row, made as they are read."""
        return LazyState(shapes_of(row), lambda name: row[name].add(self.along[name], alpha=x))

    def project(self, weights: State) -> tuple[float, float, float]:
        """(x, y) of the plane's nearest point, and the distance from it, in the same unit."""
        x = y = square = 0.0
        for name, along in self.along.items():
            moved = weights[name] - self.before[name]
            x += _dot(moved, along)
            y += _dot(moved, self.across(name))
            square += _dot(moved, moved)
        x, y, square = (value / self.norm**2 for value in (x, y, square))
        return x, y, math.sqrt(max(0.0, square - x * x - y * y))


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double().flatten().dot(b.double().flatten()))


@dataclass(frozen=True)
class Grid:
    """Points of the plane. (0, 0), before, and (1, 0), after, are among them."""

    resolution: int
    """Steps from 0 to 1 along, and from 0 to `across`."""
    across: float
    """Largest y."""

    @property
    def points(self) -> list[tuple[float, float]]:
        """(x, y), row by row; the line through before and after first, then outwards."""
        n, beyond = self.resolution, max(1, self.resolution // 2)
        rows = sorted(range(-n, n + 1), key=abs)
        return [(i / n, j / n * self.across) for j in rows for i in range(-beyond, n + beyond + 1)]


def measure(
    plane: Plane,
    grid: Grid,
    losses: Losses,
    views: Sequence[str],
    file: Path,
    progress: Callable[[int], None] = lambda done: None,  # noqa: ARG005
) -> None:
    """Append the losses of the grid's points to a CSV: x, y, a column per view. Points that it holds are not repeated.

    progress: called with the number of points done, first before anything is measured.
    """
    points = grid.points
    done = _begin(file, ["x", "y", *views], points)
    progress(done)
    row, at = None, None
    with naming(file), file.open("a", encoding="ascii") as out:
        for x, y in points[done:]:
            if row is None or y != at:
                row = None  # the former row's memory
                row, at = plane.row(y), y
            values = [x, y, *losses(plane.point(row, x), x)]
            out.write(",".join(map(repr, values)) + "\n")
            out.flush()
            os.fsync(out.fileno())
            done += 1
            progress(done)


def _begin(file: Path, header: Sequence[str], points: Sequence[tuple[float, float]]) -> int:
    """The points that `file` holds. A line that was cut off in the middle is removed. UserError for other points."""
    content = file.read_bytes() if file.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1] or f"{','.join(header)}\n".encode()
    if whole != content:
        file.write_bytes(whole)
    first, *lines = whole.decode("ascii", "replace").splitlines()
    expected = [f"{x!r},{y!r}," for x, y in points]
    if first != ",".join(header) or not all(map(str.startswith, lines, expected)) or len(lines) > len(points):
        raise UserError("--out", str(file), "holds other points than this grid's.", "Give another folder.")
    return len(lines)
