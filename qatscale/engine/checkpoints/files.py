"""A checkpoint on disk, free of the layout it was saved under.

    checkpoints/step-00000120/
        shard-00000-of-00002.safetensors    one per process: the slices it held
        shard-00001-of-00002.safetensors
        slices.npz                          of several shards: which slice lies where in which
        manifest.json                       written last: step, shapes, Adam's step counts, checksums, plugin state

A slice is named `kind/parameter/start` (kind: weight, exp_avg, exp_avg_sq) and holds fp32 elements
[start, start + n) of the flattened parameter; `kind/parameter/start/first-end`: of its columns [first, end), flattened.
Any other division of the same parameters can be assembled from them. Where Adam's count is 0, its moments are zero and
may be left out: an imported model has none. safetensors holds numbers alone: loading runs no code from the file.
A checkpoint is written into a hidden folder, which is renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qatlaw.files import LARGEST, naming, read_small, sync
from qatscale.engine.checkpoints.folders import MANIFEST, STEP, step_folders
from qatscale.engine.checkpoints.folders import list_checkpoints as list_checkpoints
from qatscale.engine.checkpoints.folders import step_folder as step_folder
from qatscale.engine.checkpoints.folders import step_of as step_of
from qatscale.engine.checkpoints.manifest import (
    FORMAT_JSON,
    MANIFEST_JSON,
    READABLE,
    SLICES,
    FileRecord,
    Manifest,
)
from qatscale.errors import UserError, first_invalid
from qatscale.files import sha256_of
from qatscale.tensor_files import not_finite, write_safetensors

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; None where none exists.

    UserError where a newer one is half-deleted: an older one would silently cost the steps between them.
    """
    newest = next(reversed(step_folders(checkpoints)), None)
    if newest and not (newest / MANIFEST).is_file():
        problem = f"half-deleted: it has no {MANIFEST}."
        raise UserError("checkpoint", str(newest), problem, other_checkpoint(newest))
    return newest


class DamageError(Exception):
    """What is wrong with a checkpoint."""


@contextmanager
def with_advice(folder: Path) -> Iterator[None]:
    """A context whose damage becomes a UserError with the checkpoint to use instead."""
    try:
        yield
    except DamageError as damage:
        raise UserError("checkpoint", str(folder), str(damage), other_checkpoint(folder)) from damage.__cause__


def read_manifest(folder: Path) -> Manifest:
    """UserError for a manifest that is missing or cannot be read, with the checkpoint to use instead."""
    with with_advice(folder):
        return _parse_manifest(folder)


def _parse_manifest(folder: Path) -> Manifest:
    try:
        text = read_small(folder / MANIFEST)
        written = FORMAT_JSON.validate_json(text)["format"]
        if written not in READABLE:
            raise DamageError(f"its {MANIFEST} is of format {written}; this version of qatscale reads {READABLE}.")
        return MANIFEST_JSON.validate_json(text)
    except FileNotFoundError:
        raise DamageError(f"no checkpoint: it has no {MANIFEST}.") from None
    except OSError as error:
        raise DamageError(f"its {MANIFEST} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DamageError(f"its {MANIFEST} cannot be read ({first_invalid(error)}).") from error


def verify_files(folder: Path, manifest: Manifest, share: int = 0, shares: int = 1, *, read: bool = True) -> None:
    """UserError if a shard is missing, truncated or, with `read`, altered. Checks every `shares`-th, from `share`."""
    with with_advice(folder):
        _check_files(folder, manifest, share, shares, read=read)


def _check_files(folder: Path, manifest: Manifest, share: int = 0, shares: int = 1, *, read: bool = True) -> None:
    if manifest.format > 2 and manifest.checksum != manifest.digest():
        raise DamageError(f"its {MANIFEST} was altered: checksum differs.")
    if STEP.match(folder.name) and step_of(folder) != manifest.step:
        raise DamageError(f"its {MANIFEST} is of step {manifest.step}: it is a copy of another checkpoint.")
    recorded = [*sorted(manifest.files.items()), *([(SLICES, manifest.slices)] if manifest.slices else [])]
    for name, expected in recorded[share::shares]:
        path = folder / name
        if not path.is_file():
            raise DamageError(f"{name} is missing.")
        if path.stat().st_size != expected["bytes"]:
            raise DamageError(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}.")
        if read and sha256_of(path) != expected["sha256"]:
            raise DamageError(f"{name} was altered: checksum differs.")


def check_finite(folder: Path, slices: Iterable[tuple[str, Tensor]]) -> None:
    """UserError where a slice of a checkpoint holds NaN or infinity. Version 0.1 saved such states."""
    if wrong := not_finite(slices):
        raise UserError("checkpoint", str(folder), f"{wrong} is not finite.", other_checkpoint(folder))


def _is_whole(folder: Path) -> bool:
    """Whether all files of a checkpoint exist unaltered, with finite values. Reads all of them."""
    try:
        manifest = _parse_manifest(folder)
        _check_files(folder, manifest)
        for name in manifest.files:
            with safe_open(folder / name, framework="pt") as file:
                if not_finite((key, file.get_tensor(key)) for key in file.keys()):  # noqa: SIM118 - not a dict
                    return False
    except (DamageError, SafetensorError):
        return False
    return True


def other_checkpoint(folder: Path) -> str:
    """The fix for a damaged checkpoint: the newest undamaged one before it, and how to use it.

    Only the first process of a job reads the earlier ones to verify them. The others name the newest unverified.
    """
    if not folder.exists():
        return "It was removed just now, as a run that trains on does; the same command takes the newest."
    before = [p for p in list_checkpoints(folder.parent) if p.name < folder.name]
    if not before:
        return "There is no earlier checkpoint beside it."
    verifies = os.environ.get("RANK", "0") == "0"
    whole = next((p for p in reversed(before) if not verifies or _is_whole(p)), None)
    if whole is None:
        return f"None of the {len(before)} earlier checkpoints beside it is intact."
    damaged = [p.name for p in [*before, folder] if p.name > whole.name]
    found = f"newest intact one before it is {whole.name} (verified just now)"
    return (
        f"The {found if verifies else f'one before it is {whole.name} (not verified)'}: give "
        f"{folder.parent.parent}@{step_of(whole)}, or remove {', '.join(damaged)} to continue from that one."
    )


# --- writing ---


def writing_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".writing-step-{step:08d}"


def write_shard(folder: Path, rank: int, ranks: int, slices: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one process's slices, flat and in fp32, and return {"name", "bytes", "sha256"}. They may lie on a GPU: one
    at a time is copied. Raises OSError, e.g. for a full disk."""
    path = folder / f"shard-{rank:05d}-of-{ranks:05d}.safetensors"
    shapes = {name: tuple(value.shape) for name, value in slices.items()}
    with naming(path):
        sha256 = write_safetensors(path, shapes, torch.float32, slices.__getitem__)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}


def commit(checkpoints: Path, manifest: Manifest) -> Path:
    """Make the written shards a checkpoint: manifest, then one rename. A checkpoint of the same step is replaced."""
    writing, final = writing_folder(checkpoints, manifest.step), step_folder(checkpoints, manifest.step)
    if len(manifest.files) > 1:
        SliceTable.scan(writing, manifest.files).save(path := writing / SLICES)
        manifest = replace(manifest, slices=FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path)))
    path = writing / MANIFEST
    path.write_text(json.dumps(asdict(replace(manifest, checksum=manifest.digest())), indent=1))
    sync(path)
    sync(writing)
    old = checkpoints / f".old-{final.name}"
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    writing.rename(final)
    sync(checkpoints)
    shutil.rmtree(old, ignore_errors=True)
    return final


def rotate(checkpoints: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` of the checkpoints that are not kept for good; return what was removed.

    Call it when no save is under way: it also clears away what killed processes left half-written or half-removed.
    Never touches a checkpoint whose manifest it cannot read.
    """
    passing = [p for p in list_checkpoints(checkpoints) if _may_go(p)]
    removed = passing[:-keep] if keep else passing
    for path in removed:
        remove(path)
    for pattern in (".old-step-*", ".writing-step-*"):
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    return removed


def remove(checkpoint: Path) -> None:
    """Hide a checkpoint by one rename, since a half-removed one must not look complete, then remove its files."""
    hidden = checkpoint.with_name(f".old-{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _may_go(folder: Path) -> bool:
    try:
        return not _parse_manifest(folder).kept
    except DamageError:
        return False


def slice_name(kind: str, parameter: str, start: int, columns: tuple[int, int] | None) -> str:
    return f"{kind}/{parameter}/{start}" + ("" if columns is None else f"/{columns[0]}-{columns[1]}")


# --- which slice lies where ---


class SliceTable(NamedTuple):
    """Where each slice is, so that a process of a large job reads one table and the bytes it needs, and no headers."""

    files: np.ndarray
    parameters: np.ndarray
    parameter: np.ndarray
    """int32 [rows], ascending; a row is a slice of all kinds."""
    shard: np.ndarray
    """int32 [rows], into `files`."""
    start: np.ndarray
    numel: np.ndarray
    columns: np.ndarray
    """int64 [rows, 2]; -1 where all columns are meant."""
    offsets: np.ndarray
    """int64 [rows, kinds]: bytes before the slice in its file; -1 where the file has none of the kind."""

    @classmethod
    def scan(cls, folder: Path, files: Iterable[str]) -> SliceTable:
        """From the headers of the shards."""
        names, rows = sorted(files), dict[tuple[str, int, int, int, int], list[int]]()
        for number, name in enumerate(names):
            try:
                for key, numel, offset in _header(folder / name):
                    kind, parameter, start, *rest = key.split("/")
                    first, _, end = rest[0].partition("-") if rest else ("-1", "", "-1")
                    row = rows.setdefault((parameter, number, int(start), int(first), int(end)), [numel, -1, -1, -1])
                    row[1 + KINDS.index(kind)] = offset
            except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
                raise DamageError(f"{name} cannot be read ({error}).") from error
        parameters = sorted({parameter for parameter, *_ in rows})
        index = {parameter: number for number, parameter in enumerate(parameters)}
        table = np.array([[index[key[0]], *key[1:], *row] for key, row in sorted(rows.items())], np.int64).reshape(
            -1, 9
        )
        small = table[:, :2].astype(np.int32)
        return cls(np.array(names), np.array(parameters), small[:, 0], small[:, 1], table[:, 2], table[:, 5],
                   table[:, 3:5], table[:, 6:])  # fmt: skip

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **self._asdict())
        sync(path)


def _header(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, elements, bytes before it) of each tensor of a safetensors file of flat fp32 tensors."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(LARGEST, path.stat().st_size):
            raise ValueError("its header is longer than the file, or than any")
        header = json.loads(file.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, tensor["shape"][0], 8 + length + tensor["data_offsets"][0]
