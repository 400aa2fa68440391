"""Permanent errors of MLflow and their cures, and limits on the time and memory that an answer may take."""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from qatscale.config.places import without_credentials
from qatscale.tracking.store import database

STALL = 60.0
"""Seconds without a confirmation after which an upload is given up, as when an answer never ends."""
MEMORY = 2 << 30
"""Bytes that a process may allocate while MLflow answers."""
_PERMANENT = {
    "BAD_REQUEST", "ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "INVALID_PARAMETER_VALUE", "INVALID_STATE",
    "PERMISSION_DENIED", "RESOURCE_DOES_NOT_EXIST", "UNAUTHENTICATED",
}  # fmt: skip
"""MLflow's error codes for requests that it will never accept."""
ADDRESS = "Check the address: an MLflow server does not answer so."
_CURES = (
    ("maintenance mode", "Set tracking.uri=sqlite:///mlflow.db; `mlflow migrate-filestore` moves former runs."),
    ("unsupported URI", "Set tracking.uri=sqlite:///FILE or http://HOST:PORT."),
    ("database schema", "`mlflow db upgrade` with the store's address brings it up to date."),
    ("Databricks credential", "Configure them, or set tracking.uri=sqlite:///FILE."),
    ("error code 40[13]|not authenticated", "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."),
    *((part, ADDRESS) for part in ("error code 404", "valid JSON format", "redirects", "ParseError", "wrong version")),
)  # fmt: skip
"""(pattern in a message, cure)"""


class RefusedError(RuntimeError):
    """MLflow will not accept the request until something is repaired. The text ends with the cure."""


def as_refused(error: BaseException) -> RefusedError | None:
    """A permanent error as a refusal; None for one that may pass, such as an unreachable server."""
    if isinstance(error, RefusedError):
        return error
    text = shown(error)
    if isinstance(error, ModuleNotFoundError):
        return RefusedError(f"{text.removesuffix('.')}. `pip install {error.name}` where the run trains.")
    cure = next((cure for pattern, cure in _CURES if re.search(pattern, text)), None)
    if cure is None and getattr(error, "error_code", None) not in _PERMANENT:
        return None
    problem = text.partition(": ")[2].split(". ")[0].removesuffix(".")  # MLflow's own advice follows
    return RefusedError(f"{problem}. {cure or 'tracking.uri=none trains without MLflow.'}")


def check_database(uri: str) -> None:
    """RefusedError where a SQLite file cannot be used; MLflow itself would retry for 100 seconds."""
    file = database(uri)
    if file is None:
        return
    if "?" in str(file) or unquote(str(file)) != str(file):
        raise RefusedError(f"{file} holds ? or %, and MLflow would use another file. Set tracking.uri=sqlite:///FILE.")
    existing = next(place for place in (file, *file.parents) if place.exists())
    if not os.access(existing, os.W_OK) or (existing != file and not existing.is_dir()):
        problem = "is write-protected" if existing == file or existing.is_dir() else "is a file"
        raise RefusedError(f"{existing} {problem}. Set tracking.uri=sqlite:///FILE to a place that can be written.")
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(6) not in (b"", b"SQLite"):
                raise RefusedError(f"{file} is no SQLite database. Set tracking.uri=sqlite:///FILE to another file.")


@contextmanager
def limited_memory() -> Iterator[None]:
    """A context that may allocate MEMORY bytes: an answer without end must not fill the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    set_limits = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([used + MEMORY, *set_limits]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def stall_limit() -> Iterator[Callable[[], None]]:
    """`limited_memory`, and TimeoutError after STALL seconds without a call of what it yields. Main thread only."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"MLflow confirmed nothing for {STALL:.0f} s")

    def progress() -> None:
        signal.setitimer(signal.ITIMER_REAL, STALL)

    handler, timer = signal.signal(signal.SIGALRM, expired), signal.getitimer(signal.ITIMER_REAL)
    progress()
    try:
        with limited_memory():
            yield progress
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def shown(error: BaseException) -> str:
    """An exception in one line, without credentials."""
    inner = error.exceptions if isinstance(error, ExceptionGroup) else [error]
    if any(isinstance(one, MemoryError) for e in inner for one in (e, e.__context__)):
        return f"an answer of more than {MEMORY >> 30} GiB"
    text = "; ".join(str(e) if isinstance(e, RefusedError) else f"{type(e).__name__}: {e}" for e in inner)
    text = without_credentials(" ".join(text.split()))
    if unreachable := _UNREACHABLE.search(text):
        return f"{unreachable[1]} cannot be reached: {unreachable[2]}"
    return text[:2000]


_UNREACHABLE = re.compile(
    r"API request to (\S+?)/api/\S+ failed with exception .*?(?:\[Errno -?\d+\] )?"
    r"(Connection refused|Connection reset by peer|Name or service not known|No route to host|"
    r"Network is unreachable|Temporary failure in name resolution|Read timed out|timed out|"
    r"too many \d+ error responses|Remote end closed connection|wrong version number|certificate verify failed)"
)
"""Finds address and reason in MLflow's long message about an unreachable server."""
