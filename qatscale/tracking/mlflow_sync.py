"""Bring MLflow up to date with a run folder. Repeating it is harmless: each point arrives once.

This holds even if an answer is lost on its way:

- the MLflow run carries the folder's unique id as a tag, which is searched for before a run is created;
- tracking.json records the run and how many bytes of metrics.jsonl are uploaded, and advances only after an answer;
- a point's timestamp is the record's own, and MLflow's SQL stores keep one row per (run, key, timestamp, step, value).
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from qatlaw.run_folders import flatten
from qatscale.files import HeldError, encode, locked
from qatscale.tracking.averages import Averages
from qatscale.tracking.records import Record, Tail, live
from qatscale.tracking.run_folder import RunFolder, Status
from qatscale.tracking.store import Cursor, artifact_location, database, quiet_mlflow, resolve_uri

MLFLOW_STATUS: dict[Status, str] = {
    "imported": "FINISHED",
    "created": "RUNNING",
    "running": "RUNNING",
    "running?": "RUNNING",
    "stopped": "KILLED",
    "killed": "KILLED",
    "failed": "FAILED",
    "done": "FINISHED",
}
RUN_TAG = "qatscale.run_id"
"""The tag that ties an MLflow run to one run folder."""
_CHUNK = 100_000
"""Bytes of metrics.jsonl between two moves of the cursor: a few hundred records, a few MLflow batches."""
_PERF = {"tokens_per_second", "tflops", "mfu", "memory_gib", "data_seconds"}
_NOT_METRICS = {"event", "time", "step", "steps", "phase", "warmup"}
_IDENTITY = attrgetter("key", "step", "value")
_MAX_PARAM = 6000
"""MLflow's limit on the length of a parameter's value."""


def points(record: Record) -> Iterator[Any]:
    """One event of metrics.jsonl as MLflow's Metrics. Null values are left out; NaN and infinities are kept."""
    from mlflow.entities import Metric

    named: dict[str, Any] = {}
    if record["event"] == "metrics":
        fields = {name: value for name, value in record.items() if name not in _NOT_METRICS}
        named = {f"{'perf' if name in _PERF else 'train'}/{name}": value for name, value in fields.items()}
    elif record["event"] == "validation":
        named = {f"val/{name}_{record['view']}": record.get(name) for name in ("loss", "perplexity")}
    elif record["event"] == "final":
        named = record["metrics"]
    for key, value in named.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield Metric(key, float(value), int(record["time"] * 1000), record["step"])


class Uploader:
    """Uploads one run folder to one MLflow store.

    Every method may raise whatever MLflow and the network raise. The cursor never precedes what the store confirmed.
    """

    def __init__(self, folder: RunFolder, uri: str) -> None:
        from mlflow.tracking import MlflowClient

        self.folder, self.uri = folder, uri
        self.recipe = folder.recipe
        cursor = Cursor.load(folder)
        # another store than last time does not know this run
        self.cursor = cursor if cursor and cursor.uri == uri else Cursor.fresh(folder, uri)
        self._connected = False
        parent = folder.run["parent"]
        self._averages = Averages(self.recipe["log_interval"], parent["step"] if parent else 0)
        self._sent: set[Any] = set()
        """(key, step, value) of uploaded points."""
        file = database(uri)
        if file is None:
            self.client = MlflowClient(uri)
        else:  # two runs must not both create the tables of an empty SQLite file
            with locked(file.with_name(f"{file.name}.lock")):
                self.client = MlflowClient(uri)

    def sync(self) -> bool:
        """Upload everything that is new. True when the run has ended and MLflow has all of it."""
        status = self.folder.status  # before the records, because a run that has ended writes no more of them
        if not self._connected:
            self._connect()
        if not self.cursor.described:
            self._describe()
        self._upload_records()
        if self.cursor.parent_run_id is None:
            self._link_to_parent()
        failures = self._upload_artifacts()
        if status != self.cursor.status:
            self._upload_status(status)
        if failures:
            raise ExceptionGroup("artifacts not uploaded", failures)
        return MLFLOW_STATUS[status] != "RUNNING"

    def _connect(self) -> None:
        """Find or create the MLflow run, and save its id before anything else is sent."""
        from mlflow.exceptions import MlflowException

        if self.cursor.run_id is not None:
            try:
                self.client.get_run(self.cursor.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self.cursor = Cursor.fresh(self.folder, self.uri)  # the store was removed and created again
        if self.cursor.run_id is None:
            experiment_id = self._experiment()
            run = self.folder.run
            tags = {RUN_TAG: run["id"]}
            found = self.client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run['id']}'", max_results=1)
            created = int(run["created"] * 1000)
            mlflow_run = found[0] if found else self.client.create_run(experiment_id, created, tags, run["name"])
            self.cursor.run_id = mlflow_run.info.run_id
            self.cursor.save(self.folder)
        for record in live(self._uploaded()):  # a superseded one may never have been sent
            self._sent.update(map(_IDENTITY, self._points(record)))
        self._connected = True

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.cursor.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        try:
            return self.client.create_experiment(name, artifact_location(self.uri, name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self.client.get_experiment_by_name(name).experiment_id  # another run was faster

    def _uploaded(self) -> Iterator[Record]:
        tail = Tail(self.folder.metrics_file)
        while tail.offset < self.cursor.offset:
            yield from tail.read(min(_CHUNK, self.cursor.offset - tail.offset))

    def _points(self, record: Record) -> list[Any]:
        """The points of a record; a metrics record has those of its point of a curve, or none."""
        if record["event"] != "metrics":
            return list(points(record))
        averaged = self._averages.add(record)
        return list(points(averaged[1])) if averaged else []

    def _describe(self) -> None:
        """Parameters: n_params and the recipe without `tracking`, since the store is not a property of the run."""
        run = self.folder.run
        flat = flatten({key: value for key, value in self.recipe.items() if key != "tracking"})
        parameters = {k: v if len(v) <= _MAX_PARAM else f"{v[: _MAX_PARAM - 1]}…" for k, v in flat.items()}
        qat = self.recipe["qat"]
        tags = {
            "scheme": qat["scheme"],
            "bits": "16" if qat["scheme"] == "fp" else f"{qat['bits']:g}",
            "mlflow.source.name": " ".join(run["command"]),
            "mlflow.source.type": "LOCAL",
            "mlflow.user": getpass.getuser(),
        }
        if run["git_commit"]:
            tags["git_commit"] = tags["mlflow.source.git.commit"] = run["git_commit"]
        if self.folder.imported:
            tags["imported"] = self.folder.imported
        if run["parent"]:
            tags["parent"] = run["parent"]["name"]
            tags["parent_step"] = str(run["parent"]["step"])
        self.log(parameters=parameters | {"n_params": str(run["n_params"])}, tags=tags)
        self.cursor.described = True
        self.cursor.save(self.folder)

    def _upload_records(self) -> None:
        tail = Tail(self.folder.metrics_file, self.cursor.offset)
        while chunk := tail.read(_CHUNK):
            fresh: list[Any] = []
            parameters: dict[str, str] = {}
            tags: dict[str, str] = {}
            new = live(chunk)
            switches = [record for record in new if record["event"] == "switch"]
            for record in new:
                for point in self._points(record):
                    # a resumed run repeats its steps exactly, and the same value at the same step is not a second point
                    if (identity := _IDENTITY(point)) not in self._sent:
                        fresh.append(point)
                        self._sent.add(identity)
                if "phase" in record:
                    tags["phase"] = record["phase"]
                if record["event"] == "final":
                    parameters |= {key: value for key, value in record["metrics"].items() if isinstance(value, str)}
            if switches:
                tags["switch_step"] = str(switches[-1]["step"])
            self.log(fresh, parameters, tags)
            for record in switches:
                report = json.dumps(encode({"step": record["step"], "report": record["report"]}), indent=2)
                self.client.log_text(self.cursor.run_id, report, "switch_report.json")
            self.cursor.offset = tail.offset
            self.cursor.save(self.folder)

    def log(
        self,
        metrics: Iterable[Any] = (),
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """One call of MLflow's client, which splits it into batches of 1,000 metrics, 100 parameters and 100 tags."""
        from mlflow.entities import Param, RunTag

        self.client.log_batch(
            self.cursor.run_id,
            metrics=list(metrics),
            params=[Param(key, value) for key, value in (parameters or {}).items()],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
        )

    def _link_to_parent(self) -> None:
        """Make a branch a child run of its trunk, once the same store has the trunk."""
        parent = self.folder.parent
        theirs = Cursor.load(parent) if parent else None
        if theirs and theirs.uri == self.uri and theirs.run_id:
            self.log(tags={"mlflow.parentRunId": theirs.run_id})
            self.cursor.parent_run_id = theirs.run_id
            self.cursor.save(self.folder)

    def _upload_artifacts(self) -> list[Exception]:
        """Upload new and changed files. Returns the failures: a store whose artifacts fail gets everything else."""
        failures: list[Exception] = []
        names = ("recipe.yaml", "ds_config.json", "run.json", "environment.json", "timeline.json")
        files = [self.folder.path / name for name in names]
        files += sorted(path for path in self.folder.figures.rglob("*") if path.is_file())
        for path in files:
            name = path.relative_to(self.folder.path)
            stat = path.stat()
            version = [stat.st_size, stat.st_mtime_ns]
            if self.cursor.artifacts.get(str(name)) == version:
                continue
            folder = None if name.parent == Path() else str(name.parent)
            try:
                self.client.log_artifact(self.cursor.run_id, str(path), folder)
            except Exception as error:  # artifact stores raise errors of every kind
                failures.append(error)
                continue
            self.cursor.artifacts[str(name)] = version
            self.cursor.save(self.folder)
        return failures

    def _upload_status(self, status: Status) -> None:
        if MLFLOW_STATUS[status] == "RUNNING":
            self.client.update_run(self.cursor.run_id, status="RUNNING")
        else:
            # the run ended when it last wrote, however much later it is uploaded
            wrote = self.folder.metrics_file if self.folder.metrics_file.exists() else self.folder.run_file
            ended = int(wrote.stat().st_mtime * 1000)
            self.client.set_terminated(self.cursor.run_id, MLFLOW_STATUS[status], ended)
        self.log(tags={"run_status": status})
        self.cursor.status = status
        self.cursor.save(self.folder)


class TrackingError(RuntimeError):
    """An upload to MLflow failed. Nothing is lost: the run folder has everything."""


def track_sync(folder: RunFolder, uri: str | None = None) -> str:
    """Upload what MLflow lacks of a run; returns the MLflow run's id. Raises TrackingError when that fails.

    `uri` None = the store of the earlier upload, or else the one of the recipe.
    """
    cursor = Cursor.load(folder)
    resolved = resolve_uri(uri or (cursor.uri if cursor else folder.recipe["tracking"]["uri"]))
    if resolved is None:
        raise TrackingError(f"Tracking of {folder.name} is off (tracking.uri = none). Name a store to upload it to.")
    try:
        with quiet_mlflow(), locked(lock_file(folder), wait=1.0):
            uploader = Uploader(folder, resolved)
            uploader.sync()
    except HeldError as error:
        raise TrackingError(f"{folder.name} is being uploaded right now: {error}.") from error
    except Exception as error:  # MLflow, its store and the network raise errors of every kind
        raise TrackingError(f"{resolved} did not accept {folder.name}: {shown(error)}") from error
    assert uploader.cursor.run_id is not None
    return uploader.cursor.run_id


def lock_file(folder: RunFolder) -> Path:
    """Every upload of a run holds the lock on this file."""
    return folder.logs / "tracking.log"


def shown(error: BaseException) -> str:
    """An exception in one line."""
    inner = error.exceptions if isinstance(error, ExceptionGroup) else [error]
    return "; ".join(f"{type(e).__name__}: {e}" for e in inner).replace("\n", " ")[:2000]
