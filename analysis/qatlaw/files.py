"""Files that are complete or absent."""

from __future__ import annotations

import errno
import fcntl
import io
import math
import os
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from annotated_types import Ge, Lt

PARTIAL = ".partial"
"""Ending of a file that is still being written."""
Count = Annotated[int, Ge(0), Lt(1 << 53)]
"""A number of things in a file; JSON holds larger ones inexactly."""
LARGEST = 64 << 20
"""Bytes of a file of JSON or YAML."""
_PIECE = 1 << 16
MOST_VALUES = 2_000_000
"""Values in it, by its commas and brackets. As objects each takes up to 600 bytes, so `[],[],…` is a bomb."""
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_small(path: Path, most_values: int = MOST_VALUES) -> bytes:
    """The content of a file of JSON or YAML. OSError, also for one of an absurd size or without an end: /dev/zero."""
    with path.open("rb") as file:
        pieces = iter(lambda: file.read(_PIECE), b"")  # read(n) would take memory for n, however short the file is
        content = b"".join(islice(pieces, LARGEST // _PIECE + 1))
    if len(content) > LARGEST:
        raise OSError(errno.EFBIG, f"larger than {LARGEST >> 20} MB", str(path))
    if sum(map(content.count, (b",", b"[", b"{"))) > most_values:
        raise OSError(errno.EFBIG, f"more than {most_values:,} values", str(path))
    return content


def decode(value: Any) -> Any:
    """The inverse of `qatscale.files.encode` for numbers: the three strings become floats again."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    return [decode(item) for item in value] if isinstance(value, list) else value


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
    """Replace `path` with `content`; a reader sees the old or the new file, never a piece of one. OSError names it."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with _only_writer(partial) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            rename_synced(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def _only_writer(partial: Path) -> BinaryIO:
    """The file, empty and locked: another process that writes it waits until it is closed."""
    while True:
        file = partial.open("ab")
        with suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # another process has renamed it
            if os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                file.truncate(0)
                return file
        file.close()


def write_figure(figure: Any, path: Path, **options: Any) -> None:
    """Replace `path` with a drawing of matplotlib's `figure`, in the format of its ending. `options`: of savefig."""
    drawing = io.BytesIO()
    figure.savefig(drawing, format=path.suffix.removeprefix(".") or "png", **options)
    write_atomic(path, drawing.getvalue())
