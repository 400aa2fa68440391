"""The rows of results.csv: one finished run each, with everything that `fit` reads of it."""

from __future__ import annotations

from qatlaw.results import read_results, write_results
from qatlaw.runs import RunRecord
from qatscale.files import locked
from qatscale.study.folder import StudyFolder
from qatscale.tracking.mlflow_sync import flatten
from qatscale.tracking.run_folder import RunFolder


def run_record(folder: RunFolder) -> RunRecord:
    """A run's folder as qatlaw reads runs, with the names that MLflow has."""
    return RunRecord(
        run_id=folder.run["id"],
        name=folder.name,
        status="FINISHED" if folder.is_done else folder.status,
        final=folder.final or {},
        recipe=flatten({key: value for key, value in folder.recipe.items() if key != "tracking"}),
        created=folder.run["created"],
        kind="imported" if folder.imported else "training",
    )


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
