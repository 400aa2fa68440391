"""New folders, which appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qatlaw.files import naming, sync
from qatscale.errors import UserError
from qatscale.files import only_process


def check_place(key: str, place: Path) -> None:
    """UserError, about `key`, where no folder can be made: before long work, not after it."""
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK, effective_ids=True):
        problem = f"{existing} is {'write-protected' if existing.is_dir() else 'a file'}."
        raise UserError(key, str(place), problem, "Choose another place.")


def check_new(out: Path, key: str = "--out") -> None:
    """UserError, about `key`, where `out` holds something already, or can be no folder."""
    if out.name in ("", ".."):
        raise UserError(key, str(out), "is not the name of a new folder.", "Name one inside it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(key, str(out), "exists already and is not empty.", "Choose another folder.")
    check_place(key, out)


@contextmanager
def appearing(out: Path, key: str = "--out") -> Iterator[Path]:
    """A hidden folder of the same name to fill. When the block ends without an error it becomes `out`, by one rename;
    else nothing is left of it. UserError, about `key`, where another process makes `out` at the same time."""
    hidden = out.with_name(f".{out.name}.partial")
    folder = hidden / out.name
    with naming(out), only_process(hidden, key, out):
        shutil.rmtree(folder, ignore_errors=True)  # of a killed process
        folder.mkdir()
        try:
            yield folder
            check_new(out, key)
            for path in (*folder.rglob("*"), folder):
                sync(path)
            folder.replace(out)
            sync(out.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
