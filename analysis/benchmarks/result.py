"""The result of a benchmark: tables with ratios, printed and written as JSON with what they were measured on."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import Skipped, Variant

from qatlaw.text_table import TextTable
from qatscale.cli.terminal import console
from qatscale.files import write_json
from qatscale.tracking.environment import environment


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
    """What is worked through: tokens, bytes, weights."""
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
    """One benchmark on one machine."""

    benchmark: str
    settings: Mapping[str, Any]
    tables: Sequence[Table]

    def write(self, path: Path) -> None:
        """JSON, with what it was measured on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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


def options_of(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also measure other projects, where installed")
    parser.add_argument("--quick", action="store_true", help="few rounds on small sizes: tests the script only")
    parser.add_argument("--out", type=Path, help="write the result with versions and hardware to this JSON file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def report(result: Result, options: argparse.Namespace) -> None:
    """Print the tables, or JSON with --json; with --out also write the JSON."""
    if options.out is not None:
        result.write(options.out)
    if options.json:
        print(json.dumps(result.as_json(), indent=1))
        return
    shown = console()
    shown.print(", ".join(f"{key} {value}" for key, value in result.settings.items()))
    for table in result.tables:
        shown.print()
        _print_table(table)


def _print_table(table: Table) -> None:
    extras = list(dict.fromkeys(key for row in table.rows for key in row.extra))
    numbers = ("time", f"{table.unit}/s", "ratio", "quartiles", *extras)
    shown = TextTable(("", *numbers), words=("",), title=table.title)
    for row in table.rows:
        low, high = row.ratio_quartiles
        figures = (shown_seconds(row.seconds), _shown(row.per_second), f"{row.ratio:.3f}", f"{low:.3f} to {high:.3f}")
        shown.add_row(row.name, *figures, *(_shown(row.extra.get(key)) for key in extras))
    console().print(shown)
    console().print(f"ratio: time over that of {table.reference} in the same round; median and quartiles of the rounds")
    for skipped in table.skipped:
        console().print(f"skipped {skipped.name}: {skipped.why}")
    for note in table.notes:
        console().print(note)


def shown_seconds(seconds: float) -> str:
    """Three or more significant digits, in the unit that suits: '12.3 ms'."""
    unit, factor = next(
        ((unit, factor) for unit, factor in (("s", 1.0), ("ms", 1e3)) if seconds * factor >= 1), ("µs", 1e6)
    )
    return f"{_shown(seconds * factor)} {unit}"


def _shown(value: float | str | None) -> str:
    """Numbers with three significant digits, or all before the point."""
    if value is None or isinstance(value, str):
        return value or ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
