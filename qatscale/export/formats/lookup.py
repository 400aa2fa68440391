"""Formats by name, and the format of what lies on disk."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from qatscale.errors import UserError, did_you_mean
from qatscale.export.formats import FORMATS
from qatscale.export.formats.base import Format


class Exported(NamedTuple):
    """An export on disk."""

    format: Format
    path: Path
    """What its clients load: the folder, or its one file of weights."""

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def get_format(name: str) -> Format:
    """UserError for a name that no format has."""
    if name not in FORMATS:
        raise UserError("--format", name, "is not a format of exports.", did_you_mean(name, FORMATS))
    try:
        return import_module(f"qatscale.export.formats.{name.replace('-', '_')}").FORMAT
    except ModuleNotFoundError as error:
        missing = f"needs the package {error.name}, which is not installed."
        raise UserError("--format", name, missing, "pip install 'qatscale[clients]'") from None


def find_export(path: Path) -> Exported | None:
    """The export at a path, recognised by what its clients look for; None for anything else."""
    for name in reversed(FORMATS):
        format = get_format(name)
        if (found := format.find(path)) is not None:
            return Exported(format, found)
    return None
