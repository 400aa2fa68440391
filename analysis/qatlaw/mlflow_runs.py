"""Runs out of MLflow, and a fitted law into it. MLflow is imported when it is asked, not before."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qatlaw.errors import InputError
from qatlaw.fit_file import FitFile
from qatlaw.runs import TEXTS, RunRecord

KIND_TAG = "qatlaw.kind"
"""`fit` marks the MLflow run of a fitted law, so that nobody takes it for a training run."""
PAGE = 500
_SQLITE = "sqlite:///"


def mlflow_records(uri: str, experiment: str) -> list[RunRecord]:
    """Every run of an experiment that is not deleted.

    InputError where there is no such store or experiment. A SQLite file that is missing is not made.
    """
    from mlflow.tracking import MlflowClient

    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).is_file():
        raise InputError(
            "tracking URI", uri, "no such database.", "Set MLFLOW_TRACKING_URI, or go where mlflow.db lies."
        )
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = [one.name for one in client.search_experiments()]
        near = difflib.get_close_matches(experiment, names, n=1, cutoff=0.5)
        do = f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(sorted(names)) or 'none'}."
        raise InputError("--experiment", experiment, f"{uri} has no experiment of this name.", do)
    return [_record(run) for run in _all_runs(client, found.experiment_id)]


def log_fit(uri: str, experiment: str, file: FitFile, path: Path, name: str) -> str:
    """Write a fitted law down as a finished run of the experiment, with the file as its artifact; returns its id."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    run = client.create_run(found.experiment_id, tags={KIND_TAG: "fit"}, run_name=name)
    now = run.info.start_time
    metrics: dict[str, Any] = {f"fit/{key}": value for key, value in file.law.coefficients.items()}
    metrics |= {f"fit/{key}": file.quality.get(key) for key in ("r2", "mae", "sigma", "fraction_mae")}
    for key, (low, high) in file.intervals.items():
        metrics |= {f"fit/{key}_low": low, f"fit/{key}_high": high}
    parameters = {"form": file.law.form.name, "data_hash": file.data["hash"], "runs": file.data["runs"]}
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(key, float(value), now, 0) for key, value in metrics.items() if _is_finite(value)],
        params=[Param(key, str(value)) for key, value in parameters.items()],
        tags=[RunTag("form", file.law.form.name)],
    )
    client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _all_runs(client: Any, experiment_id: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment_id], max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _record(run: Any) -> RunRecord:
    tags: Mapping[str, str] = run.data.tags
    recipe: dict[str, str] = dict(run.data.params)
    final: dict[str, Any] = dict(run.data.metrics)
    final |= {name: recipe.pop(name) for name in TEXTS if name in recipe}
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        final=final,
        recipe=recipe,
        created=run.info.start_time or 0,
        kind=tags.get(KIND_TAG, "imported" if "imported" in tags else "training"),
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
