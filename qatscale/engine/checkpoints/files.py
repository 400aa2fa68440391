"""A checkpoint on disk, free of the layout it was saved under.

    checkpoints/step-00000120/
        shard-00000-of-00002.safetensors    one per process: the slices it held
        shard-00001-of-00002.safetensors
        manifest.json                       written last: step, shapes, Adam's step counts, checksums, plugin state

A slice is named `kind/parameter/start` (kind: weight, exp_avg, exp_avg_sq) and holds fp32 elements
[start, start + n) of the flattened parameter; `kind/parameter/start/first-end`: of its columns [first, end), flattened.
Any other division of the same parameters can be assembled from them. Where Adam's count is 0, its moments are zero and
may be left out: an imported model has none. safetensors holds numbers alone: loading runs no code from the file.
A checkpoint is written into a hidden folder, which is renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Required, cast

import pydantic
import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from qatscale.errors import UserError, first_invalid
from qatscale.files import sha256_of, sync
from qatscale.tensor_files import write_safetensors

FORMAT = 3
READABLE = (1, 2, 3)
"""Format 1 has no slices of columns, and 2 no checksum of the manifest itself."""
MANIFEST = "manifest.json"
STEP = re.compile(r"^step-(\d{8,})$")

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_STRICT = ConfigDict(extra="forbid", strict=True)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class ParameterRecord:
    shape: Annotated[list[Count], Field(max_length=8)]
    adam_steps: Count
    """Adam's own count for this parameter: bias correction depends on it."""


class FileRecord(TypedDict):
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class PluginState(TypedDict, total=False):
    """As `QatPlugin.state` gives it."""

    switched_at: Required[Count | None]
    group_size: Annotated[int, Field(gt=0)] | None
    bits: dict[str, float]
    scales_at_switch: dict[str, str]


def _plugin_state(state: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], _PLUGIN.validate_python(state, strict=True))


_PLUGIN = TypeAdapter(PluginState)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Manifest:
    step: Count
    """Optimizer steps done."""
    tokens: Count
    reason: str
    """interval, boundary (also those of `checkpoint.keep_at`), signal, end or imported."""
    kept: bool
    """Stays when interval checkpoints rotate."""
    recipe_hash: str
    """`config.recipe_hash` of the recipe beside it; 16 digits of another hash in checkpoints of version 0.1."""
    data: str
    """Fingerprint of the tokens it was trained on."""
    plugin: Annotated[dict[str, Any], AfterValidator(_plugin_state)]
    """A `PluginState`."""
    parameters: dict[str, ParameterRecord]
    layout: dict[str, int]
    """The layout it was saved under, for information: processes, zero_stage, data, tensor, pipeline."""
    files: dict[Annotated[str, Field(pattern=r"^[^/\\]+$")], FileRecord] = field(default_factory=dict)
    tokenizer: str | None = None
    """Fingerprint of the tokenizer of these tokens; None where it is not known."""
    format: int = FORMAT
    checksum: str = ""
    """sha256 of all else in the manifest."""

    def digest(self) -> str:
        """What `checksum` has to be."""
        return hashlib.sha256(json.dumps(asdict(replace(self, checksum="")), sort_keys=True).encode()).hexdigest()


class _Format(TypedDict):
    format: int


_MANIFEST, _FORMAT = TypeAdapter(Manifest), TypeAdapter(_Format)


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Half-written ones are hidden by their name."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted(p for p in found if STEP.match(p.name) and (p / MANIFEST).is_file())


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; None where none exists.

    UserError where a newer one is half-deleted: an older one would silently cost the steps between them.
    """
    found = list_checkpoints(checkpoints)
    folders = sorted(p for p in checkpoints.iterdir() if STEP.match(p.name)) if checkpoints.is_dir() else []
    if folders and (not found or folders[-1] != found[-1]):
        raise UserError("checkpoint", str(folders[-1]), f"half-deleted: it has no {MANIFEST}.", advice(folders[-1]))
    return found[-1] if found else None


class _DamageError(Exception):
    """What is wrong with a checkpoint."""


@contextmanager
def _with_advice(folder: Path) -> Iterator[None]:
    """A context whose damage becomes a UserError with the checkpoint to use instead."""
    try:
        yield
    except _DamageError as damage:
        raise UserError("checkpoint", str(folder), str(damage), advice(folder)) from damage.__cause__


def read_manifest(folder: Path) -> Manifest:
    """UserError for a manifest that is missing or cannot be read, with the checkpoint to use instead."""
    with _with_advice(folder):
        return _parse_manifest(folder)


def _parse_manifest(folder: Path) -> Manifest:
    try:
        text = (folder / MANIFEST).read_bytes()
        written = _FORMAT.validate_json(text)["format"]
        if written not in READABLE:
            raise _DamageError(f"its {MANIFEST} is of format {written}; this version of qatscale reads {READABLE}.")
        return _MANIFEST.validate_json(text)
    except FileNotFoundError:
        raise _DamageError(f"no checkpoint: it has no {MANIFEST}.") from None
    except OSError as error:
        raise _DamageError(f"its {MANIFEST} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise _DamageError(f"its {MANIFEST} cannot be read ({first_invalid(error)}).") from error


def verify_files(folder: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> None:
    """UserError if a shard is missing, truncated or altered. Checks every `shares`-th file, from `share`."""
    with _with_advice(folder):
        _check_files(folder, manifest, share, shares)


def _check_files(folder: Path, manifest: Manifest, share: int = 0, shares: int = 1) -> None:
    if manifest.format > 2 and manifest.checksum != manifest.digest():
        raise _DamageError(f"its {MANIFEST} was altered: checksum differs.")
    for name, expected in sorted(manifest.files.items())[share::shares]:
        path = folder / name
        if not path.is_file():
            raise _DamageError(f"{name} is missing.")
        if path.stat().st_size != expected["bytes"]:
            raise _DamageError(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}.")
        if sha256_of(path) != expected["sha256"]:
            raise _DamageError(f"{name} was altered: checksum differs.")


def not_finite(slices: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of a slice that holds NaN or infinity."""
    return next((name for name, values in slices if values.numel() and not _is_finite(values)), None)


def _is_finite(values: Tensor) -> bool:
    low, high = torch.aminmax(values)  # NaN passes through; no mask as large as the values
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_finite(folder: Path, slices: Iterable[tuple[str, Tensor]]) -> None:
    """UserError where a slice of a checkpoint holds NaN or infinity. Version 0.1 saved such states."""
    if wrong := not_finite(slices):
        raise UserError("checkpoint", str(folder), f"{wrong} is not finite.", advice(folder))


def _is_whole(folder: Path) -> bool:
    """Whether all files of a checkpoint exist unaltered, with finite values. Reads all of them."""
    try:
        manifest = _parse_manifest(folder)
        _check_files(folder, manifest)
        for name in manifest.files:
            with safe_open(folder / name, framework="pt") as file:
                if not_finite((key, file.get_tensor(key)) for key in file.keys()):  # noqa: SIM118 - not a dict
                    return False
    except (_DamageError, SafetensorError):
        return False
    return True


def advice(folder: Path) -> str:
    """The fix for a damaged checkpoint: the newest undamaged one before it, and how to use it.

    Only the first process of a job reads the earlier ones to verify them. The others name the newest unverified.
    """
    before = [p for p in list_checkpoints(folder.parent) if p.name < folder.name]
    if not before:
        return "There is no earlier checkpoint beside it."
    verifies = os.environ.get("RANK", "0") == "0"
    whole = next((p for p in reversed(before) if not verifies or _is_whole(p)), None)
    if whole is None:
        return f"None of the {len(before)} earlier checkpoints beside it is whole."
    damaged = [p.name for p in [*before, folder] if p.name > whole.name]
    run, step = folder.parent.parent, int(whole.name.removeprefix("step-"))
    found = f"newest whole one before it is {whole.name} (verified just now)"
    return (
        f"The {found if verifies else f'one before it is {whole.name} (not verified)'}: give {run}@{step}, or remove "
        f"{', '.join(damaged)} to go on from there."
    )


# --- writing ---


def writing_folder(checkpoints: Path, step: int) -> Path:
    """The hidden folder of a checkpoint that is not complete yet."""
    return checkpoints / f".writing-step-{step:08d}"


def write_shard(folder: Path, rank: int, ranks: int, slices: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one process's slices, flat and in fp32, and return {"name", "bytes", "sha256"}. They may lie on a GPU: one
    at a time is copied. Raises OSError, e.g. for a full disk."""
    path = folder / f"shard-{rank:05d}-of-{ranks:05d}.safetensors"
    shapes = {name: tuple(value.shape) for name, value in slices.items()}
    try:
        sha256 = write_safetensors(path, shapes, torch.float32, slices.__getitem__)
    except OSError as error:  # of a write, which does not know its file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}


def commit(checkpoints: Path, manifest: Manifest) -> Path:
    """Make the written shards a checkpoint: manifest, then one rename. A checkpoint of the same step is replaced."""
    writing, final = writing_folder(checkpoints, manifest.step), step_folder(checkpoints, manifest.step)
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
        path.rename(path.with_name(f".old-{path.name}"))  # half-removed must not look complete
    for pattern in (".old-step-*", ".writing-step-*"):
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    return removed


def _may_go(folder: Path) -> bool:
    try:
        return not _parse_manifest(folder).kept
    except _DamageError:
        return False


# --- reading ---


def slice_name(kind: str, parameter: str, start: int, columns: tuple[int, int] | None) -> str:
    """The name of a slice in a shard."""
    return f"{kind}/{parameter}/{start}" + ("" if columns is None else f"/{columns[0]}-{columns[1]}")


@dataclass(frozen=True)
class _SavedSlice:
    key: str
    file: str
    start: int
    numel: int
    columns: tuple[int, int] | None


class CheckpointReader:
    """Any slice of any parameter of a checkpoint, assembled from the slices it was saved in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._files: dict[str, Any] = {}
        self._slices: dict[tuple[str, str], list[_SavedSlice]] = {}
        for name in sorted(self.manifest.files):
            try:
                self._files[name] = file = safe_open(folder / name, framework="pt")
                for key in file.keys():  # noqa: SIM118 - not a dict
                    kind, parameter, start, *columns = key.split("/")
                    first, _, end = columns[0].partition("-") if columns else ("", "", "")
                    numel = file.get_slice(key).get_shape()[0]
                    saved = _SavedSlice(key, name, int(start), numel, (int(first), int(end)) if columns else None)
                    self._slices.setdefault((kind, parameter), []).append(saved)
            except (SafetensorError, OSError, ValueError, IndexError) as error:  # the latter two: an altered header
                problem = f"{name} cannot be read ({error})."
                raise UserError("checkpoint", str(folder), problem, advice(folder)) from error

    def read(self, kind: str, parameter: str, start: int, numel: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter or of its flattened columns [first, end), fp32."""
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        slices = self._slices.get((kind, parameter), [])
        if not slices and kind != "weight" and self.manifest.parameters[parameter].adam_steps == 0:
            return out.zero_()
        for saved in slices:
            if saved.columns == columns:
                filled += self._copy(saved, start, out)
            else:
                filled += self._pick(saved, start, columns, out, self.manifest.parameters[parameter].shape)
        if filled != numel:
            missing = f"{kind} of {parameter}: {filled} of {numel} elements are there."
            raise UserError("checkpoint", str(self.folder), missing, advice(self.folder))
        return out

    def _chunk(self, saved: _SavedSlice, low: int, high: int) -> Tensor:
        """Its elements [low, high), counted as its `start` is."""
        return self._files[saved.file].get_slice(saved.key)[low - saved.start : high - saved.start]

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
        """A full parameter, fp32."""
        shape = torch.Size(self.manifest.parameters[name].shape)
        return self.read(kind, name, 0, shape.numel()).view(shape)

    def weights(self) -> dict[str, Tensor]:
        """All parameters, fp32: a state dict."""
        return {name: self.parameter(name) for name in self.manifest.parameters}
