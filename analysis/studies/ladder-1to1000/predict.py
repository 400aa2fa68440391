"""Predictions for points that have not been trained, from the runs that have: CSV to the standard output.

    python analysis/studies/ladder-1to1000/predict.py results.csv 396k:4.6M 194k:18.4M > predictions.csv

Every law is fitted on the sequential runs in the table. `law` gives the loss at each fraction of the grid and `f*`; the
rival laws know no split, and the closed form no loss.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qatlaw.amounts import parse_amount
from qatlaw.errors import InputError
from qatlaw.fraction import optimal_fraction
from qatlaw.laws.base import LawForm
from qatlaw.results import read_results
from qatlaw.runs import collect
from qatlaw.summary import form_named
from qatlaw.table import RunTable
from qatlaw.validation import laws_for, predicted

FORMS = ("qat_unified", "qat_per_bits", "chen_2025", "kumar_2024")
FRACTIONS = (0.02, 0.05, 0.15, 0.35, 0.65, 0.9)


def wanted(N: float, D: float, widths: list[float]) -> RunTable:
    """The grid's runs of one size and token count, with a loss that stands for none yet."""
    point = {"n_params": N, "scheme": "sequential", "loss": 1.0}
    rows = [point | {"tokens_fp": (1 - f) * D, "tokens_qat": f * D, "bits": B} for B in widths for f in FRACTIONS]
    return RunTable.from_frame(pd.DataFrame(rows), "what is predicted")


def main() -> None:
    table = collect(read_results(Path(sys.argv[1])), "results.csv").table.of_scheme("sequential")
    points = [tuple(parse_amount("POINT", text) for text in pair.split(":")) for pair in sys.argv[2:]]
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["law", "n_params", "tokens", "bits", "f*", *(f"loss at f={f:g}" for f in FRACTIONS)])
    for N, D in points:
        for B in table.widths:
            closed = optimal_fraction(N, D, B)
            out.writerow(["closed form", N, D, f"{B:g}", f"{closed:.3f}", *[""] * len(FRACTIONS)])
    for form in map(form_named, FORMS):
        try:
            write(out, form, table, points)
        except InputError as error:
            print(f"{form.name}: {error}", file=sys.stderr)


def write(out: Any, form: LawForm, table: RunTable, points: list[tuple[float, ...]]) -> None:
    laws = laws_for(form, table)
    for N, D in points:
        losses = np.reshape(predicted(laws, wanted(N, D, table.widths)), (len(table.widths), -1))
        for B, row in zip(table.widths, losses, strict=True):
            best = f"{float(laws[B].optimal_fraction(N, D, B)):.3f}" if form.has_fraction else ""
            out.writerow([form.name, N, D, f"{B:g}", best, *(f"{loss:.4f}" for loss in row)])


if __name__ == "__main__":
    main()
