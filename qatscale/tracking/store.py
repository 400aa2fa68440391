"""Which MLflow store a run belongs to, how far it is uploaded, and the command that shows it. Imports no mlflow."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from qatscale.files import read_json, write_json
from qatscale.tracking.run_folder import RunFolder, Status

_SQLITE = "sqlite:///"


def resolve_uri(configured: str | None, known: str | None = None) -> str | None:
    """The tracking URI with absolute paths; None = no tracking.

    `configured` (tracking.uri of the recipe) precedes MLFLOW_TRACKING_URI, which precedes `known` (the store that has
    the run already), which precedes SQLite in the working folder. `none` turns tracking off.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or known or f"{_SQLITE}mlflow.db"
    if uri.lower() == "none":
        return None
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
    if "://" not in uri and not uri.startswith(("file:", "databricks")):
        return str(Path(uri).absolute())
    return uri


def database(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where a new experiment keeps its artifacts: mlartifacts/ beside a SQLite file; None = the server decides.

    MLflow itself would put them into ./mlruns of the current folder.
    """
    file = database(uri)
    return (file.parent / "mlartifacts" / experiment).as_uri() if file else None


def ui_command(uri: str) -> str:
    """The command that opens the runs in MLflow's UI, or the address of a server."""
    if uri.startswith(("http://", "https://")):
        return uri
    beside = Path(sys.executable).with_name("mlflow")
    on_path = shutil.which("mlflow")
    found = on_path is not None and Path(on_path).resolve() == beside.resolve()
    program = "mlflow" if found else os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    return shlex.join([program, "ui", "--backend-store-uri", uri])


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
    experiment: str
    run_id: str | None = None
    offset: int = 0
    """Bytes of metrics.jsonl that MLflow has confirmed."""
    described: bool = False
    """Whether parameters and constant tags are uploaded."""
    parent_run_id: str | None = None
    artifacts: dict[str, list[int]] = {}
    """Size and modification time (ns) of each uploaded file."""
    status: Status | None = None
    """The run's status as MLflow knows it."""

    @classmethod
    def fresh(cls, folder: RunFolder, uri: str) -> Cursor:
        return cls(uri=uri, experiment=folder.recipe["tracking"]["experiment"])

    @classmethod
    def load(cls, folder: RunFolder) -> Cursor | None:
        """None where nothing was uploaded. Raises ValueError for a damaged file."""
        return cls.model_validate(read_json(folder.tracking_file)) if folder.tracking_file.exists() else None

    def save(self, folder: RunFolder) -> None:
        write_json(folder.tracking_file, self.model_dump())
