"""results.csv, the table that a study leaves: one row a finished run, as tracking knows it.

Columns are `name`, the final metrics and the recipe's keys, without those that differ from machine to machine (speeds,
paths) or have no effect on the result. `qatlaw.runs.collect` turns it into a table to fit on.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qatlaw.errors import InputError
from qatlaw.files import read_small, write_atomic
from qatlaw.measurement import settings_with_effect
from qatlaw.names import VAL_LOSS
from qatlaw.run_folders import RunRecord

RECIPE = "recipe."
"""Prefix of a recipe's keys, which share names with metrics."""
_FIRST = ("name", "scheme", "n_params", "bits", "tokens_total", "qat_fraction", VAL_LOSS)
MOST_CELLS = 10_000_000
"""A study of 10,000 runs has two million."""
_PASSING_METRICS = ("tokens_per_second",)


def write_results(path: Path, records: Iterable[RunRecord]) -> None:
    """Replace the file; every number reads back as the same number."""
    rows = []
    for record in records:
        final = {key: value for key, value in record.final.items() if not key.startswith(_PASSING_METRICS)}
        recipe = settings_with_effect(record.recipe)
        rows.append({"name": record.name, **final, **{f"{RECIPE}{key}": value for key, value in recipe.items()}})
    others = {key for row in rows for key in row} - set(_FIRST)
    columns = [*_FIRST, *sorted(others, key=lambda column: (column.startswith(RECIPE), column))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def read_results(path: Path) -> list[RunRecord]:
    """InputError where the file is not such a table."""
    try:
        text = read_small(path, MOST_CELLS).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(path), None, f"cannot be read: {error}.") from None
    records = []
    for number, row in enumerate(rows):
        if not row.get("name") or None in row or None in row.values():
            problem = "is not a row of a study's results."
            raise InputError(f"{path}, line {number + 2}", None, problem, "Restore the file.")
        filled = {key: text for key, text in row.items() if text != ""}
        final = {key: _value(text) for key, text in filled.items() if key != "name" and not key.startswith(RECIPE)}
        recipe = {key.removeprefix(RECIPE): text for key, text in filled.items() if key.startswith(RECIPE)}
        records.append(RunRecord(row["name"], row["name"], "FINISHED", final, recipe, float(number)))
    return records


def holds_results(path: Path) -> bool:
    """Whether a table is a study's results rather than any table of runs."""
    if path.suffix != ".csv" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return f",{RECIPE}" in file.readline()


def _value(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if math.isfinite(number) and text.lstrip("-").isdigit() else number
