"""The rows of results.csv: one finished run each, with everything that `fit` reads of it."""

from __future__ import annotations

from qatlaw.results import read_results, write_results
from qatscale.files import locked
from qatscale.study.folder import StudyFolder
from qatscale.tracking.run_record import run_record


def record(folder: StudyFolder, *names: str) -> None:
    """Add the rows of finished runs, in the order of the tree. Rows that exist stay as they are."""
    with locked(folder.path / ".results"):
        rows = {row.name: row for row in (read_results(folder.results) if folder.results.exists() else [])}
        for name in names:
            rows.setdefault(name, run_record(folder.run(name)))
        order = {name: i for i, name in enumerate(folder.jobs)}
        write_results(folder.results, sorted(rows.values(), key=lambda row: order.get(row.name, len(order))))


def unrecorded(folder: StudyFolder) -> list[str]:
    """Finished runs without a row, whose worker ended before it wrote one."""
    recorded = folder.recorded()
    return [name for name in folder.jobs if name not in recorded and folder.run(name).is_done]
