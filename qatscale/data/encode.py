"""What a tokenizing process does: a batch of records in, token ids and counts of both splits out."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qatscale.data.records import Batch
from qatscale.data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
_FEW = 6
"""Batches, of 1 MB each."""


@dataclass(frozen=True)
class EncodedSplit:
    """`tokens` [sum of lengths], documents one after another, each with its EOS; `lengths` [documents] int32."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class Encoded:
    splits: dict[str, EncodedSplit]
    empty: int
    """Records without text, left out."""
    position: Any
    """Where its source goes on."""


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is held out: by its content alone, so that order, shards and copies change nothing."""
    first = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    return first < fraction * 2.0**64


def encode(batch: Batch, tokenizer: Tokenizer, validation_fraction: float) -> Encoded:
    """Raises UserError for a record that is no document."""
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    empty = 0
    for text in batch.texts():
        if not text or text.isspace():
            empty += 1
            continue
        raw = text.encode()
        split = SPLITS[is_validation(raw, validation_fraction)]
        texts[split].append(text)
        sizes[split] += len(raw)
    splits = {split: _encode_texts(texts[split], sizes[split], tokenizer) for split in SPLITS}
    return Encoded(splits, empty, batch.position)


def _encode_texts(texts: list[str], size: int, tokenizer: Tokenizer) -> EncodedSplit:
    eos = np.array([tokenizer.eos_id], tokenizer.dtype)
    parts: list[np.ndarray] = []
    for ids in tokenizer.encode_batch(texts):
        parts += (ids, eos)
    lengths = np.array([len(ids) + 1 for ids in parts[::2]], np.int32)
    return EncodedSplit(np.concatenate(parts) if parts else np.zeros(0, tokenizer.dtype), lengths, size)


def encode_all(batches: Iterable[Batch], folder: Path, validation_fraction: float, workers: int) -> Iterator[Encoded]:
    """Encode batches in their order with the tokenizer saved in `folder`; at most 3 x workers are on their way.

    One worker is this process itself, and so it is for few batches: starting others takes longer.
    Raises UserError like `encode`, RuntimeError when a worker process dies.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, _FEW))
    batches = itertools.chain(first, batches)
    if workers == 1 or len(first) < _FEW:
        tokenizer = load_tokenizer(folder)
        yield from (encode(batch, tokenizer, validation_fraction) for batch in batches)
        return
    # spawn: a fork of a process that has threads (Arrow's, PyTorch's) may deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (folder, validation_fraction))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a tokenizing process died, most likely for want of memory; the same command goes on from the last "
            "finished shard, and fewer workers need less"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_tokenizer: Tokenizer
_fraction: float


def _start_worker(folder: Path, validation_fraction: float) -> None:
    global _tokenizer, _fraction
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops and ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer, _fraction = load_tokenizer(folder), validation_fraction


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for its next batch for ever."""
    parent = multiprocessing.parent_process()
    with contextlib.suppress(OSError):
        assert parent is not None
        parent.join()
    os._exit(1)


def _work(batch: Batch) -> Encoded:
    return encode(batch, _tokenizer, _fraction)
