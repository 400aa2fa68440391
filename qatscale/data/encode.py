"""Tokenizing processes: batches of records in, token ids and counts of both splits out."""

from __future__ import annotations

import contextlib
import functools
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
from typing import Any, get_args

import numpy as np

from qatscale.data.manifest import Split
from qatscale.data.sources import Batch
from qatscale.data.tokenizer import Tokenizer, load_tokenizer
from qatscale.errors import FailedError

SPLITS = get_args(Split)
_FEW = 6
"""Batches, of 1 MB each, that are tokenized faster than other processes start."""


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
    """Where their source continues."""


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is held out. Only its content decides, so that order, shards and copies change nothing."""
    first = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    return first < fraction * 2.0**64


def encode(batch: Batch, tokenizer: Tokenizer, validation_fraction: float) -> Encoded:
    """Raises UserError for a record that is not a document."""
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
    parts = [np.zeros(0, tokenizer.dtype)]
    lengths = []
    for ids in tokenizer.encode_batch(texts):
        parts += (ids, eos)
        lengths.append(len(ids) + 1)
    return EncodedSplit(np.concatenate(parts), np.array(lengths, np.int32), size)


def encode_all(batches: Iterable[Batch], folder: Path, validation_fraction: float, workers: int) -> Iterator[Encoded]:
    """Encode batches in their order with the tokenizer saved in `folder`; at most 3 x workers are in flight.

    One worker, or few batches, are encoded in this process. Raises UserError like `encode`, and FailedError when a
    worker process dies, or where processes cannot share memory.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, _FEW))
    batches = itertools.chain(first, batches)
    if workers == 1 or len(first) < _FEW:
        tokenizer = load_tokenizer(folder)
        yield from (encode(batch, tokenizer, validation_fraction) for batch in batches)
        return
    # spawn: a fork of a process that has threads (Arrow's, PyTorch's) may deadlock
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    except OSError as error:
        raise FailedError(f"/dev/shm: {error.strerror}. --workers 1 needs none of it.") from None
    waiting: deque[Future[Encoded]] = deque()
    own = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for batch in batches:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a worker inherits it: its parent ends it
            waiting.append(pool.submit(_encode_in_worker, batch, folder, validation_fraction))
            signal.pthread_sigmask(signal.SIG_SETMASK, own)
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise FailedError(
            "a tokenizing process died, probably because memory ran out. The same command continues from the last "
            "finished shard; fewer --workers need less memory."
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, own)
        for worker in list(pool._processes.values()):  # nobody waits for what they still do
            worker.kill()
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes occupy the cores already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for its next batch forever."""
    parent = multiprocessing.parent_process()
    with contextlib.suppress(OSError):
        assert parent is not None
        parent.join()
    os._exit(1)


_loaded_once = functools.cache(load_tokenizer)


def _encode_in_worker(batch: Batch, folder: Path, validation_fraction: float) -> Encoded:
    return encode(batch, _loaded_once(folder), validation_fraction)
