"""Files that are either whole or not there: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatscale.errors import UserError

PARTIAL = ".partial"
"""Ending of a file that is still being written."""


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_synced(partial: Path, final: Path) -> None:
    partial.replace(final)
    sync_folder(final.parent)


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


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it when the process ends, however it ends.

    Raises UserError when another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("out", str(folder), "another `qatscale prepare` is writing here.", "Wait for it.") from None
        yield
