"""Reading checkpoints: any slice of any parameter, and a checkpoint as people name one."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qatscale.config.recipe import is_unaltered, load_run_config
from qatscale.config.schema import RunConfig
from qatscale.engine.checkpoints.files import (
    KINDS,
    STEP,
    DamageError,
    SliceTable,
    check_finite,
    list_checkpoints,
    newest_checkpoint,
    other_checkpoint,
    read_manifest,
    step_of,
    verify_files,
    with_advice,
)
from qatscale.engine.checkpoints.folders import MANIFEST
from qatscale.engine.checkpoints.manifest import SLICES, Manifest
from qatscale.errors import UserError

LARGEST_TABLE = 4 << 30
"""Bytes of the unpacked table of slices: some 50 million slices."""


class _SavedSlice(NamedTuple):
    file: str
    offset: int
    start: int
    numel: int
    columns: tuple[int, int] | None


class CheckpointReader:
    """Any slice of any parameter of a checkpoint, assembled from the slices it was saved in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._table = slice_table(folder, self.manifest)
        self._number = {str(name): number for number, name in enumerate(self._table.parameters)}

    def read(self, kind: str, parameter: str, start: int, numel: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter or of its flattened columns [first, end), fp32."""
        out = torch.empty(numel, dtype=torch.float32)
        filled, known = 0, False
        for saved in self._saved(kind, parameter, start, numel, columns):
            known = True
            if saved.columns == columns:
                filled += self._copy(saved, start, out)
            else:
                filled += self._pick(saved, start, columns, out, self.manifest.parameters[parameter].shape)
        if not known and kind != "weight" and self.manifest.parameters[parameter].adam_steps == 0:
            return out.zero_()
        if filled != numel:
            raise self._damaged(f"{kind} of {parameter}: only {filled} of {numel} elements are saved.")
        return out

    def _saved(
        self, kind: str, parameter: str, start: int, numel: int, columns: tuple[int, int] | None
    ) -> Iterator[_SavedSlice]:
        """The slices that may hold some of these elements."""
        if parameter not in self._number:
            return
        table, number = self._table, self._number[parameter]
        rows = slice(*np.searchsorted(table.parameter, [number, number + 1]))
        begin, size, own = table.start[rows], table.numel[rows], table.columns[rows]
        same = (own == (columns or (-1, -1))).all(axis=1)
        wanted = ~same | ((begin < start + numel) & (begin + size > start))
        wanted &= (offsets := table.offsets[rows, KINDS.index(kind)]) >= 0
        for row in np.flatnonzero(wanted).tolist():
            first, end = own[row].tolist()
            file = str(table.files[table.shard[rows][row]])
            yield _SavedSlice(
                file, int(offsets[row]), int(begin[row]), int(size[row]), None if first < 0 else (first, end)
            )

    def _damaged(self, problem: str) -> UserError:
        return UserError("checkpoint", str(self.folder), problem, other_checkpoint(self.folder))

    def _chunk(self, saved: _SavedSlice, low: int, high: int) -> Tensor:
        """Its elements [low, high), counted as its `start` is."""
        path, offset = self.folder / saved.file, saved.offset + 4 * (low - saved.start)
        try:
            values = np.fromfile(path, "<f4", high - low, offset=offset)
        except (OSError, ValueError) as error:
            raise self._damaged(f"{saved.file} cannot be read ({error}).") from error
        if len(values) != high - low:
            raise self._damaged(f"{saved.file} is cut off.")
        return torch.from_numpy(values)

    def _copy(self, saved: _SavedSlice, start: int, out: Tensor) -> int:
        """Copy what a slice of the same columns holds of [start, start + len(out)); returns how much that was."""
        low, high = max(start, saved.start), min(start + len(out), saved.start + saved.numel)
        if low >= high:
            return 0
        out[low - start : high - start] = self._chunk(saved, low, high)
        return high - low

    def _pick(
        self, saved: _SavedSlice, start: int, columns: tuple[int, int] | None, out: Tensor, shape: list[int]
    ) -> int:
        """As `_copy`, from a slice of other columns: only the rows concerned are read."""
        (first, end), (own_first, own_end) = columns or (0, shape[1]), saved.columns or (0, shape[1])
        width, own_width = end - first, own_end - own_first
        rows = start // width, -(-(start + len(out)) // width)
        low, high = max(saved.start, rows[0] * own_width), min(saved.start + saved.numel, rows[1] * own_width)
        if low >= high:
            return 0
        index = torch.arange(low, high)
        column = index % own_width + own_first - first
        target = index.div(own_width, rounding_mode="floor") * width + column - start
        wanted = (column >= 0) & (column < width) & (target >= 0) & (target < len(out))
        out[target[wanted]] = self._chunk(saved, low, high)[wanted]
        return int(wanted.sum())

    def parameter(self, name: str, kind: str = "weight") -> Tensor:
        """A full parameter, fp32. UserError where it is not finite."""
        shape = torch.Size(self.manifest.parameters[name].shape)
        value = self.read(kind, name, 0, shape.numel()).view(shape)
        check_finite(self.folder, [(f"{kind} of {name}", value)])
        return value

    def weights(self) -> dict[str, Tensor]:
        """All parameters, fp32: a state dict."""
        return {name: self.parameter(name) for name in self.manifest.parameters}


def slice_table(folder: Path, manifest: Manifest) -> SliceTable:
    """UserError where it cannot be read, with the checkpoint to use instead."""
    with with_advice(folder):
        if manifest.slices is None:
            return SliceTable.scan(folder, manifest.files)
        try:
            with np.load(folder / SLICES) as saved:
                if sum(part.file_size for part in saved.zip.infolist()) > LARGEST_TABLE:
                    raise ValueError("larger than any table")
                table = SliceTable(**{name: saved[name] for name in SliceTable._fields})
            if sorted(manifest.files) != table.files.tolist() or len({len(column) for column in table[2:]}) != 1:
                raise ValueError("it is of other files")
            return table
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DamageError(f"{SLICES} cannot be read ({error}).") from error


def only_data(folder: Path | None) -> list[str]:
    """Overrides for prepared data in `folder` instead of a run's own; none for None."""
    return [f"data.path={folder}", "data.mix=null", "data.cooldown_mix=null"] if folder else []


def open_checkpoint(what: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, CheckpointReader]:
    """A checkpoint, named as `find_checkpoint` takes it, and its run's configuration with `overrides`.

    UserError where it is damaged, or where the run's recipe is missing or was altered since the save.
    """
    folder = find_checkpoint(what)
    recipe = folder.resolve().parent.parent / "recipe.yaml"
    if not recipe.is_file():
        raise UserError("checkpoint", what, f"its run's recipe is not beside it ({recipe}).")
    reader = CheckpointReader(folder)
    if not is_unaltered(recipe, reader.manifest.recipe_hash):
        problem = f"{recipe} was altered after the checkpoint was saved: it describes another model or run."
        raise UserError("checkpoint", what, problem, "Restore the recipe.")
    verify_files(folder, reader.manifest)
    return load_run_config(recipe, overrides), reader


def find_checkpoint(what: str | Path) -> Path:
    """A checkpoint from how people name one: its folder, a run folder (its newest), or `RUN@STEP`.

    UserError where none exists, with those that do.
    """
    path, at = Path(what), ""
    if not path.exists() and "@" in str(what):  # where a path holds one, the last is meant
        text, _, at = str(what).rpartition("@")
        path = Path(text)
    if not at and STEP.match(path.resolve().name):
        if not (path / MANIFEST).is_file():
            raise UserError("checkpoint", str(path), "no complete checkpoint here.", other_checkpoint(path))
        return path
    found = list_checkpoints(path / "checkpoints")
    newest = None if at else newest_checkpoint(path / "checkpoints")
    if not found:
        none = "no run folder with a complete checkpoint, and no checkpoint folder."
        raise UserError("checkpoint", str(what), none, _what_is_there(path))
    if newest:
        return newest
    steps = {step_of(path): path for path in found}
    if not at.isdecimal() or int(at) not in steps:
        problem = f"no checkpoint at step {at}; there are: {', '.join(map(str, steps))}."
        raise UserError("checkpoint", str(what), problem)
    return steps[int(at)]


def _what_is_there(path: Path) -> str:
    """Where no checkpoint is."""
    if path.is_file():
        return "It is a file; give the folder of a run or of a checkpoint."
    if not path.is_dir():
        fetch = f" Download a model of the Hub first: hf download {path} --local-dir {path.name}"
        return "The folder does not exist." + fetch * (len(path.parts) == 2 and not path.parent.exists())
    if (path / "run.json").is_file():
        return "The run has none yet."
    if (path / "export.json").is_file():
        return "It is an export: its losses are in its export.json, and `generate` and `evaluate --harness` read it."
    if (path / "config.json").is_file():
        convert = f"qatscale convert {path} --to checkpoint --out runs/NAME --recipe RECIPE"
        return f"It looks like a Hugging Face model; make it a run to branch from: {convert}"
    runs = sorted(str(file.parent) for file in path.glob("*/run.json"))
    return f"It holds runs; give one: {', '.join(runs[:5])}." if runs else "It holds no run.json."
