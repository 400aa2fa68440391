"""Which MLflow store a run belongs to, and the command that shows it. Imports no mlflow."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SQLITE = "sqlite:///"


def resolve_uri(configured: str | None, known: str | None = None) -> str | None:
    """The tracking URI with absolute paths; None = no tracking.

    `configured` (tracking.uri of the recipe) goes before MLFLOW_TRACKING_URI, that before `known` (the store that has
    the run already), that before SQLite in the working folder. `none` means no tracking.
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

    MLflow's own choice would be ./mlruns under whatever folder a process happens to run in.
    """
    file = database(uri)
    return (file.parent / "mlartifacts" / experiment).as_uri() if file else None


def ui_command(uri: str) -> str:
    """What a person types to see the runs: the command that opens the MLflow UI, or a server's own address."""
    if uri.startswith(("http://", "https://")):
        return uri
    beside = Path(sys.executable).with_name("mlflow")
    on_path = shutil.which("mlflow")
    found = on_path is not None and Path(on_path).resolve() == beside.resolve()
    program = "mlflow" if found else os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    return shlex.join([program, "ui", "--backend-store-uri", uri])


@contextmanager
def quiet_mlflow(timeout: int = 10) -> Iterator[None]:
    """MLflow without its INFO lines and telemetry, with HTTP requests that give up after `timeout` seconds; retries
    are the caller's. What the user set in the environment stays."""
    settings = {
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])  # where mlflow is imported already
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
