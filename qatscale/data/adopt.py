"""Shards that Megatron-LM, GPT-NeoX or NeMo wrote: a manifest beside them makes them a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import qatscale
from qatscale.data.indexed import WRITE_AGAIN, IndexedReader
from qatscale.data.manifest import NAME, Manifest, Shard, Split, SplitCounts, TokenizerCard
from qatscale.errors import UserError

_CHUNK = 1 << 24


def adopt(
    folder: Path | str,
    *,
    train: Sequence[str],
    validation: Sequence[str] = (),
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Manifest:
    """Write `manifest.json` for indexed-dataset files that lie in `folder`; the files stay as they are.

    train, validation: names of shards without `.bin`/`.idx`, relative to `folder`.
    vocab_size: of the tokenizer; None = one more than the largest id found.

    Reads every token once: for the checksums, and so that no id outside `vocab_size` reaches a model. Raises UserError
    for a shard that is missing, damaged or unlike the others, for such an id, and where a manifest is there already.
    """
    folder = Path(folder)
    if (folder / NAME).exists():
        raise UserError("folder", str(folder), f"has a {NAME} already.")
    names: dict[Split, Sequence[str]] = {"train": train, "validation": validation}
    readers = {name: IndexedReader(folder / name, WRITE_AGAIN) for split in names.values() for name in split}
    if not train:
        raise UserError("train", None, "name at least one shard.", "Without its ending, relative to the folder.")
    first = readers[train[0]]
    largest = 0
    for name, reader in readers.items():
        reader.check_contiguous()
        if reader.dtype != first.dtype:
            others = f"tokens of {reader.dtype.name}, and those of {train[0]} are {first.dtype.name}."
            raise UserError("shard", name, others, "Shards of one data set have one dtype.")
        largest = max(largest, _largest_id(reader, name))
    if vocab_size is not None and largest >= vocab_size:
        raise UserError("vocab_size", vocab_size, f"the shards hold id {largest}.", "Give the size of their tokenizer.")
    size = largest + 1 if vocab_size is None else vocab_size
    manifest = Manifest(
        qatscale=qatscale.__version__,
        dtype=first.dtype.name,
        tokenizer=TokenizerCard(kind="unknown", fingerprint=None, vocab_size=size, eos_id=eos_id, folder=None),
        sources=[],
        identity={"adopted": {split: list(shards) for split, shards in names.items()}},
        empty_documents=0,
        splits={split: _counts(shards, readers) for split, shards in names.items()},
    )
    manifest.save(folder)
    return manifest


def _largest_id(reader: IndexedReader, name: str) -> int:
    largest = 0
    for start in range(0, len(reader.tokens), _CHUNK):
        part = reader.tokens[start : start + _CHUNK]
        if int(np.min(part)) < 0:
            raise UserError("shard", name, f"holds the negative id {int(np.min(part))}; ids count from 0.")
        largest = max(largest, int(np.max(part)))
    return largest


def _counts(names: Sequence[str], readers: dict[str, IndexedReader]) -> SplitCounts:
    shards = [Shard.of(name, readers[name].files()) for name in names]
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    return SplitCounts(documents=documents, tokens=tokens, text_bytes=None, shards=shards)
