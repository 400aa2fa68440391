"""A run folder as qatlaw reads runs."""

from __future__ import annotations

from qatlaw.runs import RunRecord
from qatscale.tracking.mlflow_page import parameters
from qatscale.tracking.run_folder import RunFolder


def run_record(folder: RunFolder) -> RunRecord:
    """A run's folder as MLflow would have the run."""
    return RunRecord(
        run_id=folder.run["id"],
        name=folder.name,
        status="FINISHED" if folder.is_done else folder.status,
        final=folder.final or {},
        recipe=parameters(folder),
        created=folder.run["created"],
        kind="imported" if folder.imported else "training",
    )
