"""results.csv, the table that a study leaves: one row a finished run, as tracking knows it.

Columns are `name`, the final metrics and the recipe's keys, without what differs from machine to machine (speeds,
paths) or touches no result. `qatlaw.runs.collect` makes the table to fit on of it: it finds trials of one point
and adds a row for each post-training quantization.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qatlaw.errors import InputError
from qatlaw.measurement import settings_with_effect
from qatlaw.names import VAL_LOSS
from qatlaw.runs import RunRecord

RECIPE = "recipe."
"""Before a recipe's keys, which share names with metrics."""
_FIRST = ("name", "scheme", "n_params", "bits", "tokens_total", "qat_fraction", VAL_LOSS)
_PASSING_METRICS = ("tokens_per_second",)


def write_results(path: Path, records: Iterable[RunRecord]) -> None:
    """Replace the file; numbers are written so that they read back the same."""
    rows = [_row(record) for record in records]
    columns = [*_FIRST, *sorted({key for row in rows for key in row} - set(_FIRST), key=_metrics_first)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text.getvalue(), encoding="utf-8")
    partial.replace(path)


def read_results(path: Path) -> list[RunRecord]:
    """InputError where the file is not such a table."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(path), None, f"cannot be read: {error}.") from None
    for number, row in enumerate(rows, start=2):
        if not row.get("name") or None in row or None in row.values():
            raise InputError(f"{path}, line {number}", None, "is not a row of a study's results.", "Restore the file.")
    return [_record(row, float(number)) for number, row in enumerate(rows)]


def holds_results(path: Path) -> bool:
    """Whether a table is a study's results rather than any table of runs."""
    if path.suffix != ".csv" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return f",{RECIPE}" in file.readline()


def _metrics_first(column: str) -> tuple[bool, str]:
    return column.startswith(RECIPE), column


def _row(record: RunRecord) -> dict[str, Any]:
    final = {key: value for key, value in record.final.items() if not key.startswith(_PASSING_METRICS)}
    metrics = {key: repr(value) if isinstance(value, float) else value for key, value in final.items()}
    recipe = settings_with_effect(record.recipe)
    return {"name": record.name, **metrics, **{f"{RECIPE}{key}": value for key, value in recipe.items()}}


def _record(row: dict[str, str], created: float) -> RunRecord:
    final = {
        key: _value(text) for key, text in row.items() if key != "name" and text != "" and not key.startswith(RECIPE)
    }
    recipe = {key.removeprefix(RECIPE): text for key, text in row.items() if key.startswith(RECIPE) and text != ""}
    return RunRecord(row["name"], row["name"], "FINISHED", final, recipe, created)


def _value(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if math.isfinite(number) and text.lstrip("-").isdigit() else number
