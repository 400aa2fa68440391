"""Documents of finished shards that are held out for validation, without copying or altering a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from qatscale.data.indexed import IndexedReader, Shard
from qatscale.data.manifest import Split, SplitCounts

_STRETCHES = 64
"""Most runs of neighbouring documents that are held out; each adds two entries to the manifest."""


def hold_out(folder: Path, shards: Sequence[Shard], fraction: float) -> dict[Split, SplitCounts]:
    """Cut whole shards into `train` and `validation`: about `fraction` of the documents, at least one of two or more.

    The documents are cut into equal parts. A fixed draw places one held-out run of neighbours in each, so that the
    validation split is spread over the corpus whatever the order of its documents.
    """
    ends = np.cumsum([0, *(shard.documents for shard in shards)])
    total = int(ends[-1])
    held = min(max(1, round(fraction * total)), total - 1)
    parts = np.arange(min(held, _STRETCHES) + 1) * total // min(held, _STRETCHES)
    lengths = np.diff(np.arange(len(parts)) * held // (len(parts) - 1))
    draws = np.random.Philox(key=0).random_raw(len(lengths)) % (np.diff(parts) - lengths + 1).astype(np.uint64)
    starts = parts[:-1] + draws.astype(np.int64)
    # document where a split begins or ends, or a shard
    cuts = sorted({0, total, *ends.tolist(), *starts.tolist(), *(starts + lengths).tolist()})
    splits: dict[Split, list[Shard]] = {"train": [], "validation": []}
    for first, end in pairwise(cuts):
        index = int(np.searchsorted(ends, first, side="right")) - 1
        part = int(np.searchsorted(starts, first, side="right")) - 1
        is_held = part >= 0 and first < starts[part] + lengths[part]
        split = splits["validation" if is_held else "train"]
        split.append(_stretch(folder, shards[index], first - int(ends[index]), end - int(ends[index])))
    return {name: SplitCounts.of(found) for name, found in splits.items()}


def _stretch(folder: Path, shard: Shard, first: int, end: int) -> Shard:
    """Documents [first, end) of a shard."""
    reader = IndexedReader(folder / shard.name)
    starts = np.append(reader.pointers // reader.dtype.itemsize, len(reader.tokens))[reader.documents]
    begin, stop = int(starts[first]), int(starts[end])
    return shard.model_copy(update={"documents": end - first, "start": begin, "tokens": stop - begin})
