"""Files that are complete or absent, strict JSON in them, and locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from qatlaw.files import PARTIAL as PARTIAL
from qatlaw.files import Count as Count
from qatlaw.files import decode as decode
from qatlaw.files import naming, read_small, without_duplicates, write_atomic
from qatlaw.files import rename_synced as rename_synced
from qatscale.errors import FailedError, UserError, first_invalid

Value = TypeVar("Value")


class HeldError(FailedError):
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


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` as `write_json` takes it, with a checksum of all of it, which `read_checked` compares."""
    return {**content, "checksum": _digest(encode(content))}


def _digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_checked(path: Path, schema: TypeAdapter[Value], key: str, fix: str = "") -> Value:
    """A JSON file of ours by its schema. UserError, about `key`, with the file, and the field where one is damaged."""
    try:
        raw = read_small(path)
        value = schema.validate_json(raw, strict=True)
        content = json.loads(raw, object_pairs_hook=without_duplicates)
    except ValidationError as error:
        raise UserError(key, str(path), f"is damaged: {first_invalid(error)}.", fix) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(key, str(path), f"cannot be read: {reason}.", fix) from None
    if isinstance(content, dict) and content.get("checksum", "") not in ("", _digest(content)):
        raise UserError(key, str(path), "was altered: its checksum differs.", fix)
    return value


def encode(value: Any) -> Any:
    """`value` in the types of strict JSON: NumPy and torch scalars become numbers, paths strings, dataclasses objects.

    JSON has no floats that are not finite. They become the strings "NaN", "Infinity" and "-Infinity", as in the JSON
    mapping of Protocol Buffers. ValueError for what has no form in JSON.
    """
    return json.loads(to_json(value, inf_nan_mode="strings", fallback=_plain))


def _plain(value: Any) -> Any:
    """What pydantic does not know, as something that it knows."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a NumPy or torch scalar
        return value.item()
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} {value!r} has no form in JSON")


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
    with path.open("a+b", buffering=0) as file:  # opened for writing alone a pipe would wait for a reader
        while True:
            try:
                with naming(path):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end or give_up():
                    raise HeldError(f"another process holds the lock on {path}") from None
                time.sleep(0.1)
        yield


@contextmanager
def only_process(folder: Path, key: str, shown: Path | None = None) -> Iterator[None]:
    """A context in which no other process writes `folder`. UserError, about `key`, where one does.

    shown: what the error names instead of the folder.
    """
    try:
        with locked(folder / ".lock", wait=0):
            yield
    except HeldError:
        raise UserError(key, str(shown or folder), "another process is writing there.", "Wait for it.") from None
