"""Shards that Megatron-LM, GPT-NeoX or NeMo wrote become a dataset: a manifest is written beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import qatscale
from qatscale.data.held_out import hold_out
from qatscale.data.indexed import WRITE_AGAIN, IndexedReader
from qatscale.data.indexed_writer import described
from qatscale.data.manifest import NAME, Manifest, Split, SplitCounts, TokenizerCard
from qatscale.errors import UserError

_CHUNK = 1 << 24


DEFAULT_FRACTION = 0.01


def adopt(
    folder: Path,
    *,
    train: Sequence[str],
    validation: Sequence[str] = (),
    validation_fraction: float | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Manifest:
    """Write `manifest.json` for the indexed-dataset files in `folder`; the files stay as they are.

    train, validation: names of shards without `.bin`/`.idx`, relative to `folder`.
    validation_fraction: without `validation`, the share of the training shards' documents that is held out, as
        `hold_out` chooses them; None = 1 %.
    vocab_size: that of their tokenizer; None = one more than the largest id found.
    eos_id: the token that ends a document, for `data.document_mask`.

    Reads every token once, for the checksums and so that no id outside `vocab_size` reaches a model. Raises UserError
    for a shard that is missing, damaged or of another dtype, for such an id, and where a manifest exists already.
    """
    if (folder / NAME).exists():
        raise UserError("folder", str(folder), f"has a {NAME} already.", "Remove it to adopt the shards anew.")
    if not train:
        raise UserError("train", None, "name at least one shard.", "Give it without its ending, relative to FOLDER.")
    if validation and validation_fraction is not None:
        problem = "the validation shards decide what is held out."
        raise UserError("validation_fraction", validation_fraction, problem, "Leave out one of the two.")
    fraction = 0 if validation else DEFAULT_FRACTION if validation_fraction is None else validation_fraction
    if not 0 <= fraction <= 0.5:
        raise UserError("validation_fraction", fraction, "must be 0 to 0.5.", "1 % is usual: 0.01")
    train, validation = (
        [name.removesuffix(".bin").removesuffix(".idx") for name in shards] for shards in (train, validation)
    )
    names: dict[Split, Sequence[str]] = {"train": train, "validation": validation}
    dtype, largest, found = None, 0, {}
    for name in (*train, *validation):  # one open at a time
        reader = IndexedReader(folder / name, WRITE_AGAIN)
        reader.check_contiguous()
        dtype = dtype or reader.dtype
        if reader.dtype != dtype:
            problem = f"holds tokens of {reader.dtype.name}, and those of {train[0]} are {dtype.name}."
            raise UserError("shard", name, problem, "Shards of one dataset need one dtype.")
        for start in range(0, len(reader.tokens), _CHUNK):
            part = reader.tokens[start : start + _CHUNK]
            if part.min() < 0:
                raise UserError("shard", name, f"holds the negative id {part.min()}; ids count from 0.")
            largest = max(largest, int(part.max()))
        found[name] = described(reader, name)
    if both := sorted({*train} & {*validation}):
        raise UserError("shard", both[0], "is named for training and as held out.", "Leave out one of the two.")
    assert dtype is not None
    if vocab_size is not None and largest >= vocab_size:
        raise UserError("vocab_size", vocab_size, f"the shards hold id {largest}.", "Give the size of their tokenizer.")
    size = largest + 1 if vocab_size is None else vocab_size
    if eos_id is not None and not 0 <= eos_id < size:
        raise UserError("--eos", eos_id, f"is not a token: the vocabulary has {size}.")
    splits = {split: SplitCounts.of([found[name] for name in members]) for split, members in names.items()}
    if fraction and splits["train"].documents > 1:
        splits = hold_out(folder, splits["train"].shards, fraction)
    manifest = Manifest(
        qatscale=qatscale.__version__,
        dtype=dtype.name,
        tokenizer=TokenizerCard(kind="unknown", fingerprint=None, vocab_size=size, eos_id=eos_id, folder=None),
        sources=[],
        identity={"adopted": {split: list(shards) for split, shards in names.items()}, "validation_fraction": fraction},
        empty_documents=0,
        splits=splits,
    )
    manifest.save(folder)
    return manifest
