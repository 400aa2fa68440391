"""Bring MLflow up to date with a run folder. Repeating it is harmless: each point arrives once.

This holds even if an answer is lost on its way:

- the MLflow run carries the folder's unique id as a tag, which is searched for before a run is created;
- tracking.json records the run and how many bytes of metrics.jsonl are uploaded, and advances only after an answer;
- a point's timestamp is the record's own, and MLflow's SQL stores keep one row per (run, key, timestamp, step, value).

What an ended run has sent is read back. A store that was restored from a backup, or a proxy that answered in its place,
lacks some of it, and gets all of it again.
"""

from __future__ import annotations

import getpass
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from qatlaw.errors import InputError
from qatscale.config.places import without_credentials
from qatscale.files import HeldError, encode, locked
from qatscale.supervise import process
from qatscale.tracking.averages import Averages
from qatscale.tracking.mlflow_page import (
    EXPERIMENT_TAGS,
    NOTE_TAG,
    VIEW_TAG,
    dataset_inputs,
    description,
    parameters,
    points,
    view_state,
)
from qatscale.tracking.records import Record, Tail, live
from qatscale.tracking.refusals import ADDRESS, RefusedError, as_refused, check_database, shown, stall_limit
from qatscale.tracking.run_folder import RunFolder, Status
from qatscale.tracking.store import Cursor, artifact_location, database, known_store, quiet_mlflow, resolve_uri

MLFLOW_STATUS: dict[Status, str] = {
    "imported": "FINISHED", "done": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "killed": "KILLED",
    "created": "RUNNING", "running": "RUNNING", "running?": "RUNNING",
}  # fmt: skip
Texts = Mapping[str, str] | None
RUN_TAG = "qatscale.run_id"
"""The tag that ties an MLflow run to one run folder."""
_CHUNK = 100_000
"""Bytes of metrics.jsonl between two moves of the cursor: a few hundred records, a few MLflow batches."""
_IDENTITY = attrgetter("key", "step", "value")


class Uploader:
    """Uploads one run folder to one MLflow store.

    Errors of MLflow and the network pass through. The cursor never precedes what the store has confirmed.
    """

    def __init__(self, folder: RunFolder, uri: str, progress: Callable[[], None] = lambda: None) -> None:
        """progress: called whenever the store confirmed something. RefusedError for a file that cannot be written."""
        from mlflow.tracking import MlflowClient

        check_database(uri)
        self.folder, self.uri, self._progress = folder, uri, progress
        self.recipe = folder.recipe
        self._begin(Cursor.of_store(folder, uri))
        self.is_connected = False
        file = database(uri)
        # two runs must not both create the tables of an empty SQLite file
        with locked(file.with_name(f"{file.name}.lock")) if file else nullcontext():
            self.client = MlflowClient(uri)

    def sync(self) -> bool:
        """Upload everything that is new. True when the run has ended and MLflow has all of it."""
        status = self.folder.status  # before the records, because a run that has ended writes no more of them
        if not self.is_connected:
            self._connect()
        if not self.cursor.described:
            self._describe()
        self._upload_records()
        ended = MLFLOW_STATUS[status] != "RUNNING"
        if ended and self._sent and self._is_incomplete():
            self._begin(self.cursor.model_copy(update={"offset": 0, "artifacts": {}, "status": None}))
            self._describe()
            self._upload_records()
            if self._is_incomplete():
                raise RefusedError(f"MLflow confirmed metrics and does not have them. {ADDRESS}")
        if self.cursor.parent_run_id is None:
            self._link_to_parent()
        failures = self._upload_artifacts()
        if status != self.cursor.status:
            self._upload_status(status)
        if failures:
            raise ExceptionGroup("artifacts not uploaded", failures)
        return ended

    def _is_incomplete(self) -> bool:
        """Whether the store lacks points that it confirmed: a key, or a step of the key with the most points."""
        keys = Counter(key for key, *_ in self._sent)
        [(most, _)] = keys.most_common(1)
        steps = {step for key, step, _ in self._sent if key == most}
        there = {point.step for point in self.client.get_metric_history(self.cursor.run_id, most)}
        return not (steps <= there and keys.keys() <= self.client.get_run(self.cursor.run_id).data.metrics.keys())

    def _begin(self, cursor: Cursor) -> None:
        self.cursor, parent = cursor, self.folder.run["parent"]
        self._averages = Averages(self.recipe["log_interval"], parent["step"] if parent else 0)
        self._sent: set[Any] = set()
        """(key, step, value) of uploaded points."""

    def _connect(self) -> None:
        """Find or create the MLflow run, and save its id before anything else is sent."""
        from mlflow.exceptions import MlflowException

        experiment_id = self._experiment()  # where it was deleted, so were its runs
        if self.cursor.run_id:
            try:
                found_run = self.client.get_run(self.cursor.run_id)
                if found_run.info.lifecycle_stage == "deleted":
                    restore = f"`mlflow runs restore --run-id {self.cursor.run_id}` brings it back."
                    raise RefusedError(f"The run was deleted in MLflow. {restore}")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                # the store was removed and created again
                known = {"follower": self.cursor.follower, "asked": self.cursor.asked}
                self._begin(Cursor.fresh(self.folder, self.uri).model_copy(update=known))
        self.cursor.experiment_id = experiment_id
        if not self.cursor.run_id:
            run = self.folder.run
            tags = {RUN_TAG: run["id"]}
            found = self.client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run['id']}'", max_results=1)
            created = int(run["created"] * 1000)
            mlflow_run = found[0] if found else self.client.create_run(experiment_id, created, tags, run["name"])
            self.cursor.run_id = mlflow_run.info.run_id
            if not self.cursor.run_id:
                raise RefusedError(f"A run was created and has no id. {ADDRESS}")
            self._save()
        for record in live(self._uploaded()):  # a superseded one may never have been sent
            self._sent.update(map(_IDENTITY, self._points(record)))
        self.is_connected = self.cursor.answered = True
        self._save()

    def _experiment(self) -> str:
        """Its id, once it has the tags that decide how MLflow's UI shows it. RefusedError for a deleted one."""
        from mlflow.exceptions import MlflowException

        name, tags = self.cursor.experiment, EXPERIMENT_TAGS | {VIEW_TAG: view_state()}
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location(self.uri, name), tags))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)  # another run was faster
        if found.lifecycle_stage == "deleted":
            restore = f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
            raise RefusedError(f"The experiment {name} was deleted. {restore}; tracking.experiment=NAME takes another.")
        self._move_artifacts(found)
        for key, value in tags.items():
            if found.tags.get(key) != value and not (key in EXPERIMENT_TAGS and key in found.tags):
                with suppress(MlflowException):  # another user's experiment may take runs and no tags
                    self.client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)

    def _move_artifacts(self, experiment: Any) -> None:
        """Tell a SQLite store that was moved where its artifacts lie now: MLflow records absolute places."""
        from mlflow.utils.file_utils import local_file_uri_to_path

        file, was, here = database(self.uri), experiment.artifact_location, artifact_location(self.uri, experiment.name)
        ours = here is not None and Path(was).parts[-2:] == Path(here).parts[-2:]
        if file and ours and was != here and not Path(local_file_uri_to_path(was)).exists():
            with closing(sqlite3.connect(file)) as store, store:
                for table, place in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                    moved = f"UPDATE {table} SET {place} = ? || substr({place}, ?) WHERE experiment_id = ?"
                    store.execute(moved, (here, len(was) + 1, experiment.experiment_id))

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
        """Parameters, constant tags, the corpus."""
        run = self.folder.run
        qat = self.recipe["qat"]
        tags = {
            "scheme": qat["scheme"],
            NOTE_TAG: description(self.folder),
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
            tags |= {"parent": run["parent"]["name"], "parent_step": str(run["parent"]["step"])}
        self.log(parameters=parameters(self.folder) | {"n_params": str(run["n_params"])}, tags=tags)
        if corpora := dataset_inputs(self.folder):
            self.client.log_inputs(self.cursor.run_id, corpora)
        self.cursor.described = True
        self._save()

    def _upload_records(self) -> None:
        tail = Tail(self.folder.metrics_file, self.cursor.offset)
        while chunk := tail.read(_CHUNK):
            fresh: list[Any] = []
            texts: dict[str, str] = {}
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
                    texts |= {key: value for key, value in record["metrics"].items() if isinstance(value, str)}
                    tags |= self._final_description(record["metrics"])
            if switches:
                tags["switch_step"] = str(switches[-1]["step"])
            self.log(fresh, texts, tags)
            for record in switches:
                report = encode({"step": record["step"], "report": record["report"]})
                self.client.log_dict(self.cursor.run_id, report, "switch_report.json")
            self.cursor.offset = tail.offset
            self._save()

    def _final_description(self, final: Mapping[str, Any]) -> dict[str, str]:
        """The description with losses, unless somebody has changed the one of the start."""
        shown_now = self.client.get_run(self.cursor.run_id).data.tags.get(NOTE_TAG)
        return {NOTE_TAG: description(self.folder, final)} if shown_now == description(self.folder) else {}

    def log(self, metrics: Iterable[Any] = (), parameters: Texts = None, tags: Texts = None) -> None:
        """One call of MLflow's client, which splits it into batches of 1,000 metrics, 100 parameters and 100 tags."""
        from mlflow.entities import Param, RunTag

        params = [Param(key, value) for key, value in (parameters or {}).items()]
        run_tags = [RunTag(key, value) for key, value in (tags or {}).items()]
        self.client.log_batch(self.cursor.run_id, list(metrics), params, run_tags)

    def _link_to_parent(self) -> None:
        """Make a branch a child run of its trunk, once the same store has the trunk."""
        parent = self.folder.parent
        theirs = Cursor.load(parent) if parent else None
        if theirs and theirs.uri == self.cursor.uri and theirs.run_id:
            self.log(tags={"mlflow.parentRunId": theirs.run_id})
            self.cursor.parent_run_id = theirs.run_id
            self._save()

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
            self._save()
        return failures

    def _save(self) -> None:
        self.cursor.save(self.folder)
        self._progress()

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
        self._save()


class TrackingError(RuntimeError):
    """An upload to MLflow failed. Nothing is lost: the run folder has everything."""


def track_sync(folder: RunFolder, uri: str | None = None) -> str:
    """Upload what MLflow lacks of a run; returns the MLflow run's id. Raises TrackingError when that fails.

    `uri` None = the store of the earlier upload, or else the one of the recipe. It takes over from the process that
    follows a run which has ended.
    """
    own = known_store(folder) if Cursor.load(folder) else folder.recipe["tracking"]["uri"]
    resolved = resolve_uri(uri or own, known=known_store(folder))
    if resolved is None:
        raise TrackingError(f"Tracking of {folder.name} is off (tracking.uri = none). Name a store to upload it to.")
    if folder.has_ended:
        _end_follower(folder)
    try:
        with quiet_mlflow(), locked(lock_file(folder), wait=TAKE_OVER), stall_limit() as progress:
            uploader = Uploader(folder, resolved, progress)
            uploader.sync()
            uploader.cursor.error, uploader.cursor.refused = None, False
            uploader.cursor.save(folder)
    except HeldError as error:
        raise TrackingError(f"{folder.name} is being uploaded right now: {error}.") from error
    except Exception as error:  # MLflow, its store and the network raise errors of every kind
        if isinstance(error, InputError) or getattr(error, "filename", None):
            raise  # a damaged record, or a folder without access: no fault of the store
        reason = as_refused(error) or shown(error)
        raise TrackingError(f"{without_credentials(resolved)} did not accept {folder.name}: {reason}") from error
    assert uploader.cursor.run_id is not None
    return uploader.cursor.run_id


TAKE_OVER = 15.0
"""Seconds that a follower may take to end when asked."""
HAND_OVER = signal.SIGUSR1
"""Asks a follower to end at once."""


def _end_follower(folder: RunFolder) -> None:
    cursor = Cursor.load(folder)
    if cursor and cursor.follower and process.is_alive(cursor.follower):
        with suppress(OSError):  # it has just ended, or is another user's
            os.kill(cursor.follower["pid"], HAND_OVER)


def lock_file(folder: RunFolder) -> Path:
    """Every upload of a run holds the lock on this file."""
    return folder.logs / "tracking.log"
