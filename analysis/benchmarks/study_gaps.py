"""How long a study's workers stand between two runs, read from a study's folder.

    python analysis/benchmarks/study_gaps.py FOLDER

A gap lasts from the end of one run to the first metrics record of the next run of the same worker: with log_interval 1,
as in recipe `debug`, to the end of its first step.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path


def gaps(folder: Path) -> list[float]:
    """Seconds, of all workers."""
    attempts: dict[str, list[tuple[float, float, str]]] = {}
    for path in folder.glob("claims/*.json"):
        claim = json.loads(path.read_text())
        if claim["state"] == "done":
            row = (claim["started"], claim["ended"], path.name.rpartition("~")[0])
            attempts.setdefault(claim["worker"], []).append(row)
    found = []
    for rows in map(sorted, attempts.values()):
        for (_, ended, _), (_, _, name) in itertools.pairwise(rows):
            lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
            first = next(record for record in map(json.loads, lines) if record["event"] == "metrics")
            found.append(first["time"] - ended)
    return found


if __name__ == "__main__":
    seconds = gaps(Path(sys.argv[1]))
    print(f"{len(seconds)} gaps: median {statistics.median(seconds):.2f} s, largest {max(seconds):.2f} s")
