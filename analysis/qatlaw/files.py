"""Files that are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"
"""Ending of a file that is still being written."""


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
