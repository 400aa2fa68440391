"""Puts the study's results into the package: its runs as a table of `judge`, its law for `plan --law ladder-1to1000`.

From the top of the checkout:    python analysis/studies/ladder-1to1000/ship.py
"""

from __future__ import annotations

import subprocess
import sys

from qatlaw import tables
from qatlaw.planner_law import SHIPPED

NAME = "ladder-1to1000"
RESULTS = f"analysis/studies/{NAME}/results.csv"
COLUMNS = ["name", "scheme", "bits", "tokens_fp", "tokens_qat", "loss", "hidden_size", "layers", "intermediate_size"]


def main() -> None:
    runs = tables.load_table(RESULTS).runs.frame.sort_values(["scheme", "name", "bits"])
    counts = {name: "int64" for name in COLUMNS if name not in ("name", "scheme", "loss")}
    runs[COLUMNS].astype(counts).to_csv(tables.FOLDER / f"{NAME}.csv", index=False, lineterminator="\n")
    SHIPPED.mkdir(exist_ok=True)
    fit = [sys.executable, "-m", "qatscale", "fit", "--table", RESULTS, "--out"]
    subprocess.run([*fit, str(SHIPPED / f"{NAME}.json"), "--scheme", "sequential"], check=True)


if __name__ == "__main__":
    main()
