"""Files that are complete or absent, strict JSON in them, and locks that end with the process that holds them."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from qatlaw.files import PARTIAL as PARTIAL
from qatlaw.files import rename_synced as rename_synced
from qatlaw.files import sync, write_atomic
from qatscale.errors import UserError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class HeldError(RuntimeError):
    """Another process holds a lock."""


def is_file(path: Path) -> bool:
    """As `Path.is_file`, and False for a name that is too long for a file."""
    return os.path.isfile(path)  # noqa: PTH113 - pathlib raises on such a name


def is_folder(path: Path) -> bool:
    """As `Path.is_dir`, and False for a name that is too long for a folder."""
    return os.path.isdir(path)  # noqa: PTH112


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as JSON; see `encode` and `write_atomic`."""
    text = json.dumps(encode(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, f"{text}\n".encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote. OSError, or ValueError for what is not JSON."""
    return decode(json.loads(path.read_text(encoding="utf-8")))


def encode(value: Any) -> Any:
    """`value` in the types of strict JSON: NumPy and torch scalars become numbers, paths strings, dataclasses objects.

    JSON has no floats that are not finite. They become the strings "NaN", "Infinity" and "-Infinity", as in the JSON
    mapping of Protocol Buffers. TypeError for what has no form in JSON.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a NumPy or torch scalar
        value = value.item()
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, Iterable):
        return [encode(item) for item in value]
    raise TypeError(f"{type(value).__name__} {value!r} has no form in JSON")


def decode(value: Any) -> Any:
    """The inverse of `encode` for numbers: the three strings become floats again."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


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
