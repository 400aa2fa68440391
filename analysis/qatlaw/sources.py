"""Where runs come from: a table, folders of runs, or an MLflow experiment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from qatlaw.errors import InputError
from qatlaw.results import holds_results, read_results
from qatlaw.run_folders import folder_records
from qatlaw.runs import Collected, best_trials, collect
from qatlaw.table import RunTable


def from_table(path: str | Path, columns: Mapping[str, str] | None = None, scheme: str | None = None) -> Collected:
    """A .csv or .parquet file of anyone's runs, or the results.csv of a study. For `columns`: `RunTable.read`."""
    if not holds_results(Path(path)):
        return best_trials(RunTable.read(path, columns, scheme))
    if columns:
        raise InputError("--column", dict(columns), "has no effect on a study's results.csv.", "Leave it out.")
    return collect(read_results(Path(path)), str(path))


def from_folder(folder: str | Path) -> Collected:
    """The runs of a folder of run folders, or of one run folder. InputError where no run is finished."""
    records = folder_records(Path(folder))
    if not records:
        raise InputError("--runs", str(folder), "holds no runs.", "Name a folder of run folders.")
    return collect(records, str(folder))


def from_experiment(experiment: str, uri: str | None = None) -> Collected:
    """The runs of an MLflow experiment. `uri`: of the store; None: MLFLOW_TRACKING_URI, or ./mlflow.db."""
    from qatlaw.mlflow_runs import mlflow_records

    store = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    return collect(mlflow_records(store, experiment), f"experiment {experiment}")
