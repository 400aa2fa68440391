"""Runs out of MLflow, and a fitted law into it. MLflow is imported on use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qatlaw.errors import InputError, did_you_mean
from qatlaw.fit_file import FitFile
from qatlaw.runs import TEXTS, RunRecord

KIND_TAG = "qatlaw.kind"
"""`fit` marks the MLflow run of a fitted law, so that it is not taken for a training run."""
PAGE = 500
_SQLITE = "sqlite:///"


def mlflow_records(uri: str, experiment: str) -> list[RunRecord]:
    """Every run of an experiment that is not deleted.

    InputError where the store or the experiment does not exist. A missing SQLite file is not created.
    """
    from mlflow.tracking import MlflowClient

    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():
        fix = "Set MLFLOW_TRACKING_URI, or change to the folder that holds mlflow.db."
        raise InputError("tracking URI", uri, "no such database.", fix)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        fix = did_you_mean(experiment, [one.name for one in client.search_experiments()])
        raise InputError("--experiment", experiment, f"{uri} has no experiment of this name.", fix)
    records, token = [], None
    while True:
        page = client.search_runs([found.experiment_id], max_results=PAGE, page_token=token)
        records += [_record(run) for run in page]
        token = page.token
        if not token:
            return records


def log_fit(uri: str, experiment: str, file: FitFile, path: Path, name: str) -> str:
    """Record a fitted law as a finished run of the experiment, with the file as its artifact; returns its id."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    run = client.create_run(found.experiment_id, tags={KIND_TAG: "fit"}, run_name=name)
    metrics: dict[str, Any] = dict(file.coefficients)
    metrics |= {key: file.quality.get(key) for key in ("r2", "mae", "sigma", "fraction_mae")}
    for key, (low, high) in file.intervals.items():
        metrics |= {f"{key}_low": low, f"{key}_high": high}
    finite = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
    parameters = {"form": file.form, "data_hash": file.data.hash, "runs": file.data.runs}
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(f"fit/{key}", float(value), run.info.start_time, 0) for key, value in finite.items()],
        params=[Param(key, str(value)) for key, value in parameters.items()],
        tags=[RunTag("form", file.form)],
    )
    client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _record(run: Any) -> RunRecord:
    recipe: dict[str, str] = dict(run.data.params)
    final: dict[str, Any] = dict(run.data.metrics)
    final |= {name: recipe.pop(name) for name in TEXTS if name in recipe}
    return RunRecord(
        run_id=run.info.run_id, name=run.info.run_name or run.info.run_id, status=run.info.status, final=final,
        recipe=recipe, created=run.info.start_time or 0,
        kind=run.data.tags.get(KIND_TAG, "imported" if "imported" in run.data.tags else "training"),
    )  # fmt: skip
