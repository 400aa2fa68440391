"""New folders, which appear complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qatlaw.files import sync
from qatscale.errors import UserError
from qatscale.files import only_process


def check_new(out: Path) -> None:
    """UserError where `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("--out", str(out), "exists already and is not empty.", "Choose another folder.")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A hidden folder of the same name to fill. When the block ends without an error it becomes `out`, by one rename;
    else nothing is left of it. UserError where another process makes `out` at the same time."""
    hidden = out.with_name(f".{out.name}.partial")
    folder = hidden / out.name
    try:
        hidden.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--out", str(out), f"no folder can be made there ({error.strerror}).") from None
    with only_process(hidden, "--out", out):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a killed process
            folder.mkdir()
            yield folder
            check_new(out)
            for path in (*folder.rglob("*"), folder):
                sync(path)
            folder.replace(out)
            sync(out.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
