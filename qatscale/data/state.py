"""progress.json: how far an unfinished `prepare` has come, so that the same command continues from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from qatscale.data.encode import SPLITS
from qatscale.data.indexed import Shard
from qatscale.data.manifest import NAME as MANIFEST
from qatscale.data.manifest import Manifest, SplitCounts
from qatscale.errors import UserError
from qatscale.files import PARTIAL, Count, read_checked, sealed, write_json

NAME = "progress.json"
TOKENIZER = "tokenizer"
_RESTART = "Choose another folder, or discard its content and start again: --restart"


class State(BaseModel):
    """Written after every pair of shards; whatever it does not name is unfinished."""

    model_config = ConfigDict(extra="forbid")

    identity: dict[str, Any]
    source: Count = 0
    """Index of the source to continue with."""
    position: Any = None
    """Where that source continues."""
    part: Count = 0
    """Number of the next pair of shards."""
    empty: Count = 0
    splits: dict[str, SplitCounts]
    checksum: str = ""

    @classmethod
    def fresh(cls, identity: dict[str, Any]) -> State:
        return cls(identity=identity, splits=dict.fromkeys(SPLITS, SplitCounts.of([], 0)))

    @property
    def documents(self) -> int:
        return sum(counts.documents for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.splits.values())

    def add(self, split: str, shard: Shard, text_bytes: int) -> None:
        old = self.splits[split]
        self.splits[split] = SplitCounts.of([*old.shards, shard], (old.text_bytes or 0) + text_bytes)

    def save(self, folder: Path) -> None:
        write_json(folder / NAME, sealed(self.model_dump()))


def finished(folder: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of a folder that was prepared from this identity to the end; None where it is unfinished.

    Raises UserError where another identity was prepared, or where a shard is missing or has another size.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = Manifest.load(folder)
    _check_identity(folder, "a dataset", manifest.identity, identity)
    for split, counts in manifest.splits.items():
        if counts.shards:
            manifest.check_shards(folder, split, "size")
    return manifest


def refuse_strangers(folder: Path) -> None:
    """Raise UserError where the folder holds anything but a dataset, finished or not."""
    if (folder / MANIFEST).is_file() or (folder / NAME).is_file():
        return
    strangers = sorted(p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(PARTIAL))
    if strangers:
        raise UserError("out", str(folder), f"holds other files ({', '.join(strangers[:3])}).", "Choose a new folder.")


def resume(folder: Path, identity: dict[str, Any]) -> State:
    """The state to continue from. Removes unfinished files.

    Raises UserError where finished shards have another identity.
    """
    path = folder / NAME
    if not path.is_file():
        return State.fresh(identity)
    state = read_checked(path, TypeAdapter(State), "out", _RESTART)
    if state.part == 0 and state.identity != identity:  # nothing is lost
        discard(folder)
        return State.fresh(identity)
    _check_identity(folder, "a half-prepared dataset", state.identity, identity)
    _remove_shards(folder, keep={shard.name for counts in state.splits.values() for shard in counts.shards})
    return state


def discard(folder: Path) -> None:
    """Remove what `prepare` made; the manifest first, so that it never lists missing shards."""
    for name in (MANIFEST, NAME):
        (folder / name).unlink(missing_ok=True)
    _remove_shards(folder, keep=set())
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)


def _remove_shards(folder: Path, keep: set[str]) -> None:
    for split in SPLITS:
        for file in folder.glob(f"{split}-[0-9]*.*"):
            if file.name.endswith(PARTIAL) or file.stem not in keep:
                file.unlink()
    for file in folder.glob(f".*{PARTIAL}"):  # of a killed process
        file.unlink()


def _check_identity(folder: Path, what: str, held: dict[str, Any], asked: dict[str, Any]) -> None:
    keys = sorted(key for key in held.keys() | asked.keys() if held.get(key) != asked.get(key))
    if keys:
        differences = [f"{key} is {held.get(key)!s:.160}, not {asked.get(key)!s:.160}" for key in keys]
        raise UserError("out", str(folder), f"holds {what} made otherwise: {'; '.join(differences)}.", _RESTART)
