"""What a bench has measured: tables with ratios, written as JSON."""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qatscale.bench.measure import Skipped, Variant
from qatscale.errors import UserError
from qatscale.files import write_json_atomic


@dataclass(frozen=True)
class Row:
    """One alternative. Quartiles are of the rounds."""

    name: str
    seconds: float
    """Median of a call."""
    seconds_quartiles: tuple[float, float]
    per_second: float
    """Units a second at the median."""
    ratio: float
    """Median over the rounds of the seconds over the reference's of the same round: 2 = takes twice as long."""
    ratio_quartiles: tuple[float, float]
    rounds: int
    extra: Mapping[str, float | str] = field(default_factory=dict)
    """What else is known of it, by a name that carries the unit: {"peak MiB": 412}."""


@dataclass(frozen=True)
class Table:
    """Alternatives that were timed in turns."""

    title: str
    unit: str
    """Of what is worked through: tokens, bytes, weights."""
    reference: str
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        title: str,
        unit: str,
        variants: Sequence[Variant],
        seconds: Mapping[str, Sequence[float]],
        *,
        reference: str,
        skipped: Sequence[Skipped] = (),
        notes: Sequence[str] = (),
        extra: Mapping[str, Mapping[str, float | str]] | None = None,
    ) -> Table:
        """From what `interleaved` gives; `extra`: name of a variant -> further columns."""
        base = seconds[reference]
        rows = []
        for variant in variants:
            times = seconds[variant.name]
            assert len(times) == len(base), f"{variant.name}: {len(times)} rounds, {reference}: {len(base)}"
            ratios = [mine / other for mine, other in zip(times, base, strict=True)]
            median = statistics.median(times)
            rows.append(
                Row(
                    variant.name,
                    median,
                    quartiles(times),
                    variant.amount / median,
                    statistics.median(ratios),
                    quartiles(ratios),
                    len(times),
                    dict((extra or {}).get(variant.name, {})),
                )
            )
        return cls(title, unit, reference, tuple(rows), tuple(skipped), tuple(notes))

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Result:
    """One bench on one machine."""

    bench: str
    settings: Mapping[str, Any]
    tables: Sequence[Table]

    def write(self, path: Path) -> None:
        """JSON, with what it was measured on. UserError where the file cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, self.as_json())
        except OSError as error:
            raise UserError("--out", str(path), f"it cannot be written: {error.strerror}.") from None

    def as_json(self) -> dict[str, Any]:
        from qatscale.tracking.environment import environment

        return {
            "bench": self.bench,
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join(["qatscale", *sys.argv[1:]]),
            "settings": dict(self.settings),
            "tables": [asdict(table) for table in self.tables],
            "environment": {key: value for key, value in environment().items() if key not in ("host", "hosts")},
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third, between the values; of one value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
