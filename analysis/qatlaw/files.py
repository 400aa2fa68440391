"""Files that are complete or absent."""

from __future__ import annotations

import errno
import io
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

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


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs, for json.loads. ValueError for a key that occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} occurs twice, and the later one would win")
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
    """Replace `path` with `content`; a reader sees the old or the new file, never a piece of one. OSError names it.

    Of processes that write it at once, the last one wins. A killed one leaves a hidden file. A device or pipe, such as
    /dev/null, stays what it is and is written into.
    """
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL}")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_bytes(content)
            return
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rename_synced(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context whose OSErrors name `path` where they name no file: that of a write does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_figure(figure: Any, path: Path, **options: Any) -> None:
    """Replace `path` with a drawing of matplotlib's `figure`, in the format of its ending. `options`: of savefig."""
    drawing = io.BytesIO()
    figure.savefig(drawing, format=path.suffix.removeprefix(".") or "png", **options)
    write_atomic(path, drawing.getvalue())
