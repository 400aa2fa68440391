"""Bring MLflow up to a run folder: as often as one likes, each point once.

What makes a repetition harmless, also after an answer that was lost on its way:

- the MLflow run carries the folder's unique id as a tag, which is searched for before a run is created;
- tracking.json remembers the run and how many bytes of metrics.jsonl are uploaded, and moves on only after an answer;
- a point's timestamp is the record's own, and MLflow's SQL stores keep one row per (run, key, timestamp, step, value).
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from qatscale.files import HeldError, encode, locked
from qatscale.tracking.averages import Averages
from qatscale.tracking.cursor import Cursor
from qatscale.tracking.mlflow_names import Point, flatten, points
from qatscale.tracking.records import Record, Tail, live
from qatscale.tracking.run_folder import RunFolder, Status
from qatscale.tracking.store import artifact_location, database, quiet_mlflow, resolve_uri

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


class Uploader:
    """Uploads one run folder to one MLflow store. Every call may raise whatever MLflow and the network raise; none
    leaves the cursor ahead of what the store has confirmed."""

    def __init__(self, folder: RunFolder, uri: str) -> None:
        from mlflow.tracking import MlflowClient

        self.folder, self.uri = folder, uri
        self.recipe = folder.recipe
        cursor = Cursor.load(folder)
        # another store than last time knows nothing of this run
        self.cursor = cursor if cursor and cursor.uri == uri else Cursor.at(folder, uri)
        self._connected = False
        self._superseded: set[tuple[str, int, float]] = set()
        """(key, step, value) of uploaded points that a resume took back."""
        self._averages: Averages | None = None
        with self._schema_lock():
            self.client = MlflowClient(uri)

    @property
    def run_id(self) -> str | None:
        return self.cursor.run_id

    def sync(self) -> bool:
        """Upload all there is now. True when the run has ended and MLflow knows all of it."""
        status = self.folder.status  # before the records: an ended run writes no more of them
        self._connect()
        self._describe()
        self._upload_records()
        self._link_to_parent()
        failures = self._upload_artifacts()
        self._tell_status(status)
        if failures:
            raise ExceptionGroup("artifacts not uploaded", failures)
        return MLFLOW_STATUS[status] != "RUNNING"

    def _schema_lock(self) -> AbstractContextManager[None]:
        """Two runs that meet an empty SQLite file must not both create its tables."""
        file = database(self.uri)
        return locked(file.with_name(f"{file.name}.lock")) if file else nullcontext()

    def _connect(self) -> None:
        """Find or create the MLflow run, and write its id down before anything else is sent."""
        if self._connected:
            return
        if self.cursor.run_id is not None and self._is_gone(self.cursor.run_id):
            self.cursor = Cursor.at(self.folder, self.uri)
        if self.cursor.run_id is None:
            experiment_id = self._experiment()
            run = self.folder.run
            found = self.client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run['id']}'", max_results=1)
            if not found:
                found = [
                    self.client.create_run(
                        experiment_id,
                        start_time=int(run["created"] * 1000),
                        tags={RUN_TAG: run["id"]},
                        run_name=run["name"],
                    )
                ]
            self.cursor.run_id = found[0].info.run_id
            self.cursor.save(self.folder)
        self._connected = True

    def _is_gone(self, run_id: str) -> bool:
        """Whether the store no longer has the run, e.g. because the SQLite file was removed."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return True
            raise
        return False

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.cursor.experiment
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location(self.uri, name))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)  # another run was faster
        return found.experiment_id

    def _describe(self) -> None:
        """Parameters: the recipe without `tracking` (where it is uploaded to is no property of a run), n_params."""
        if self.cursor.described:
            return
        run = self.folder.run
        parameters = flatten({key: value for key, value in self.recipe.items() if key != "tracking"})
        tags = {
            "scheme": self.recipe["qat"]["scheme"],
            "bits": "16" if self.recipe["qat"]["scheme"] == "fp" else f"{self.recipe['qat']['bits']:g}",
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
        if self._averages is None:
            self._averages = self._new_averages()
            _points_of(self._uploaded(), self._averages)
        while chunk := tail.read(_CHUNK):
            if any(record["event"] == "resume" for record in chunk):
                self._note_superseded(chunk)
            new = live(chunk)
            fresh = [
                point
                for _, shown in _points_of(new, self._averages)
                for point in shown
                # a resumed run repeats its steps exactly: the same value at the same step is no second point
                if (point.key, point.step, point.value) not in self._superseded
            ]
            phases = [record["phase"] for record in new if "phase" in record]
            final = {
                key: value
                for record in new
                if record["event"] == "final"
                for key, value in record["metrics"].items()
                if isinstance(value, str)
            }
            self.log(fresh, parameters=final, tags={"phase": phases[-1]} if phases else None)
            for record in new:
                if record["event"] == "switch":
                    self._upload_switch(record)
            self.cursor.offset = tail.offset
            self.cursor.save(self.folder)

    def _new_averages(self) -> Averages:
        parent = self.folder.run["parent"]
        return Averages(self.recipe["log_interval"], parent["step"] if parent else 0)

    def _uploaded(self) -> list[Record]:
        records: list[Record] = []
        tail = Tail(self.folder.metrics_file)
        while tail.offset < self.cursor.offset:
            records += tail.read(min(_CHUNK, self.cursor.offset - tail.offset))
        return records

    def _note_superseded(self, chunk: list[Record]) -> None:
        """Remember the points that are uploaded already and that a resume in `chunk` takes back."""
        uploaded = self._uploaded()
        kept = {id(record) for record in live([*uploaded, *chunk])}
        gone = (shown for record, shown in _points_of(uploaded, self._new_averages()) if id(record) not in kept)
        self._superseded |= {(point.key, point.step, point.value) for shown in gone for point in shown}

    def _upload_switch(self, record: Record) -> None:
        self.log(tags={"switch_step": str(record["step"])})
        text = json.dumps(encode({"step": record["step"], "report": record["report"]}), indent=2)
        self.client.log_text(self.run_id, text, "switch_report.json")

    def log(
        self,
        fresh: Iterable[Point] = (),
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """One call of MLflow's client, which splits it into batches of 1,000 metrics, 100 parameters and 100 tags."""
        from mlflow.entities import Metric, Param, RunTag

        self.client.log_batch(
            self.run_id,
            metrics=[Metric(point.key, point.value, point.timestamp, point.step) for point in fresh],
            params=[Param(key, value) for key, value in (parameters or {}).items()],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
        )

    def _link_to_parent(self) -> None:
        """A branch is a child run of its trunk, as soon as the trunk is known to the same store."""
        parent = self.folder.parent
        if parent is None or self.cursor.parent_run_id is not None:
            return
        theirs = Cursor.load(parent)
        if theirs is None or theirs.uri != self.uri or theirs.run_id is None:
            return
        self.log(tags={"mlflow.parentRunId": theirs.run_id})
        self.cursor.parent_run_id = theirs.run_id
        self.cursor.save(self.folder)

    def _upload_artifacts(self) -> list[Exception]:
        """Upload what is new or changed. A store whose artifacts fail still gets everything else."""
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
            try:
                self.client.log_artifact(self.run_id, str(path), None if name.parent == Path() else str(name.parent))
            except Exception as error:  # whatever an artifact store raises
                failures.append(error)
                continue
            self.cursor.artifacts[str(name)] = version
            self.cursor.save(self.folder)
        return failures

    def _tell_status(self, status: Status) -> None:
        if status == self.cursor.status:
            return
        if MLFLOW_STATUS[status] == "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            # the run ended when it last wrote, however much later it is uploaded
            wrote = self.folder.metrics_file if self.folder.metrics_file.exists() else self.folder.run_file
            self.client.set_terminated(self.run_id, MLFLOW_STATUS[status], int(wrote.stat().st_mtime * 1000))
        self.log(tags={"run_status": status})
        self.cursor.status = status
        self.cursor.save(self.folder)


def _points_of(records: Iterable[Record], averages: Averages) -> list[tuple[Record, list[Point]]]:
    """Each record with its points in MLflow; a metrics record with its point of a curve, if it has one."""
    found = []
    for record in records:
        shown: Record | None = record
        if record["event"] == "metrics":
            point = averages.add(record)
            shown = point[1] if point else None
        found.append((record, list(points(shown)) if shown else []))
    return found


class TrackingError(RuntimeError):
    """MLflow could not be brought up to a run. Nothing is lost: the run folder has it all."""


def track_sync(folder: RunFolder, uri: str | None = None) -> str:
    """Upload what MLflow lacks of a run; returns the MLflow run's id. Raises TrackingError when that fails.

    `uri` None = where the run was uploaded to before, or else what its recipe says.
    """
    cursor = Cursor.load(folder)
    resolved = resolve_uri(uri or (cursor.uri if cursor else folder.recipe["tracking"]["uri"]))
    if resolved is None:
        raise TrackingError(f"Tracking of {folder.name} is off (tracking.uri = none); name a store to upload it to.")
    try:
        with quiet_mlflow(), locked(lock_file(folder), wait=1.0):
            uploader = Uploader(folder, resolved)
            uploader.sync()
    except HeldError as error:
        raise TrackingError(f"{folder.name} is being uploaded right now: {error}.") from error
    except Exception as error:  # whatever MLflow, its store or the network raise
        raise TrackingError(f"{resolved} did not take {folder.name}: {shown(error)}") from error
    assert uploader.run_id is not None
    return uploader.run_id


def lock_file(folder: RunFolder) -> Path:
    """Whoever uploads a run holds the lock on this file."""
    return folder.logs / "tracking.log"


def shown(error: BaseException) -> str:
    """An exception in one line."""
    inner = error.exceptions if isinstance(error, ExceptionGroup) else [error]
    return "; ".join(f"{type(e).__name__}: {e}" for e in inner).replace("\n", " ")[:2000]
