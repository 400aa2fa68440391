"""A run's MLflow store, the state of its upload, and the command that shows it. Imports no mlflow."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from qatlaw.files import read_small
from qatscale.config.places import SQLITE, absolute_uri, moved_with, without_credentials
from qatscale.files import Count, write_json
from qatscale.supervise.claims import Identity
from qatscale.tracking.run_folder import RunFolder, Status

VIEW = "qatscale"
"""Key of the view that `mlflow_page` shares with everyone who opens the experiment."""


def resolve_uri(configured: str | None, known: str | None = None) -> str | None:
    """The tracking URI with absolute paths; None = no tracking.

    `configured` (tracking.uri of the recipe) precedes MLFLOW_TRACKING_URI, which precedes `known` (the store that has
    the run already), which precedes SQLite in the working folder. `none` turns tracking off. What a run recorded has no
    credentials: they come from MLFLOW_TRACKING_URI, if it names the same store.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = configured or given or known or f"{SQLITE}mlflow.db"
    if given and without_credentials(given) == uri:
        uri = given
    return None if uri.lower() == "none" else absolute_uri(uri)


def known_store(folder: RunFolder) -> str | None:
    """The store that has a run already, also where a SQLite file was moved together with the run's folder.

    A branch that no store has yet belongs to its parent's.
    """
    if (cursor := Cursor.load(folder)) is None:
        return known_store(folder.parent) if folder.parent else None
    file = database(cursor.uri)
    if file is None or file.exists():
        return cursor.uri
    moved = moved_with(folder.path, folder.recipe, str(file), cursor.folder)
    return f"{SQLITE}{moved}" if moved else cursor.uri


def database(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where a new experiment keeps its artifacts: mlartifacts/ beside a SQLite file; None = the server decides.

    MLflow itself would put them into ./mlruns of the current folder.
    """
    file = database(uri)
    return (file.parent / "mlartifacts" / experiment).as_uri() if file else None


def ui_command(uri: str) -> str:
    """The command that opens the runs in MLflow's UI, or the address of a server."""
    if _is_server(uri):
        return without_credentials(uri)
    beside = Path(sys.executable).with_name("mlflow")
    on_path = shutil.which("mlflow")
    found = on_path is not None and Path(on_path).resolve() == beside.resolve()
    program = "mlflow" if found else os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    return shlex.join([program, "ui", "--backend-store-uri", without_credentials(uri)])


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def page_address(uri: str, experiment_id: str) -> str:
    """The page with an experiment's runs and charts, on the server or on the one that `ui_command` starts."""
    server = without_credentials(uri).rstrip("/") if _is_server(uri) else "http://127.0.0.1:5000"
    view = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    return f"{server}/#/experiments/{experiment_id}/runs?{view}"


def where_to_look(folders: Iterable[RunFolder]) -> list[str]:
    """Lines with the command and page that show the runs in MLflow; empty where none was uploaded."""
    seen = dict.fromkeys((known_store(one), c.experiment_id) for one in folders if (c := Cursor.load(one)) is not None)
    lines = []
    for uri, experiment_id in seen:
        if uri is None or experiment_id is None:
            continue
        page = page_address(uri, experiment_id)
        lines.append(f"MLflow: {page}" if _is_server(uri) else f"MLflow: {ui_command(uri)}\n  shows the runs at {page}")
    return lines


@contextmanager
def quiet_mlflow(timeout: int = 10) -> Iterator[None]:
    """MLflow without INFO lines, telemetry and retries, and with HTTP requests that end after `timeout` seconds.

    Variables that the user set in the environment keep their values.
    """
    settings = {
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])  # if mlflow is imported already
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


class Cursor(BaseModel):
    """tracking.json: the state of a run's upload."""

    uri: str
    """Without credentials."""
    folder: str = ""
    """The run's folder when this was saved: store and run may move together, more than once."""
    experiment: str
    experiment_id: str | None = None
    run_id: str | None = None
    offset: Count = 0
    """Bytes of metrics.jsonl that MLflow has confirmed."""
    described: bool = False
    """Whether parameters and constant tags are uploaded."""
    parent_run_id: str | None = None
    artifacts: dict[str, list[int]] = {}
    """Size and modification time (ns) of each uploaded file."""
    status: Status | None = None
    """The run's status as MLflow knows it."""
    follower: Identity | None = None
    """The process that follows the run, from its first contact with the store on, see `process.identity`."""
    asked: float | None = None
    """When that process first asked the store, in seconds of its host's monotonic clock."""
    answered: bool = False
    """Whether the store has answered it, or failed to."""
    error: str | None = None
    """Why the newest attempt failed; None after one that did not."""
    refused: bool = False
    """Whether the store will not take the run as things stand."""

    @classmethod
    def fresh(cls, folder: RunFolder, uri: str) -> Cursor:
        return cls(uri=without_credentials(uri), experiment=folder.recipe["tracking"]["experiment"])

    @classmethod
    def of_store(cls, folder: RunFolder, uri: str) -> Cursor:
        """The recorded cursor; a fresh one for a store that does not have the run yet."""
        cursor = cls.load(folder)
        return cursor if cursor and cursor.uri == without_credentials(uri) else cls.fresh(folder, uri)

    @classmethod
    def load(cls, folder: RunFolder) -> Cursor | None:
        """None where nothing was uploaded, or where the file is damaged: MLflow knows the run by its tag."""
        try:
            return cls.model_validate_json(read_small(folder.tracking_file))
        except (OSError, ValueError):
            return None

    def save(self, folder: RunFolder) -> None:
        write_json(folder.tracking_file, self.model_dump() | {"folder": str(folder.path.absolute())})
