"""Files that are either whole or not there, and locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qatscale.errors import UserError

PARTIAL = ".partial"
"""Ending of a file that is still being written."""


class HeldError(RuntimeError):
    """Another process holds a lock."""


def is_file(path: Path) -> bool:
    """As `Path.is_file`, and False for a name that is too long for a file."""
    return os.path.isfile(path)  # noqa: PTH113 - pathlib raises on such a name


def is_folder(path: Path) -> bool:
    """As `Path.is_dir`, and False for a name that is too long for a folder."""
    return os.path.isdir(path)  # noqa: PTH112


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_synced(partial: Path, final: Path) -> None:
    partial.replace(final)
    sync(final.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` with `content`; a reader sees the old or the new file, never a piece of one."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename_synced(partial, path)


def write_json_atomic(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def check_new(out: Path) -> None:
    """UserError where `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("--out", str(out), "exists already and is not empty.", "Choose another folder.")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A hidden folder of the same name to fill. When the block ends without an error it becomes `out`, by one rename;
    else nothing is left of it."""
    hidden = out.with_name(f".{out.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    folder = hidden / out.name
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError("--out", str(out), f"no folder can be made there ({error.strerror}).") from None
    try:
        yield folder
        sync(folder)
        folder.replace(out)
        sync(out.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: float | None = None, give_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is made if need be; the kernel lets go of it when the process ends.

    Raises HeldError after `wait` seconds, or once `give_up` says so, while another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (math.inf if wait is None else wait)
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end or give_up():
                    raise HeldError(f"another process holds the lock on {path}") from None
                time.sleep(0.1)
        yield
