"""Writes and describes the shards that `qatscale.data.indexed` reads."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from qatscale.data.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION, IndexedReader, Shard
from qatscale.files import PARTIAL, rename_synced, sha256_of, write_atomic

SMALL_VOCABULARY = 65_500
"""Vocabularies below this size are stored in 16 bits, as in Megatron-LM."""
_CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else int32."""
    return np.dtype("<u2") if vocab_size < SMALL_VOCABULARY else np.dtype("<i4")


class IndexedWriter:
    """Writes one shard under temporary names; `finish` makes it appear complete."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._name, self._dtype = prefix.name, dtype
        self._bin, self._idx = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
        self._partial = self._bin.with_name(self._bin.name + PARTIAL)
        self._file = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._lengths: list[np.ndarray] = []
        self.tokens = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `tokens` [sum(lengths)] one after another, `lengths` [documents]."""
        assert int(lengths.sum()) == len(tokens)
        assert (lengths > 0).all()
        data = np.ascontiguousarray(tokens, dtype=self._dtype).data
        self._hash.update(data)
        self._file.write(data)
        self._lengths.append(lengths.astype("<i4"))
        self.tokens += len(tokens)

    def finish(self) -> Shard:
        """Flush both files to the disk and give them their names."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths = np.concatenate(self._lengths)
        index = encode_index(lengths, self._dtype)
        rename_synced(self._partial, self._bin)
        write_atomic(self._idx, index)
        return Shard(
            name=self._name, documents=len(lengths), tokens=self.tokens, bin_bytes=self.tokens * self._dtype.itemsize,
            idx_bytes=len(index), bin_sha256=self._hash.hexdigest(), idx_sha256=hashlib.sha256(index).hexdigest(),
        )  # fmt: skip


def encode_index(lengths: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    """The bytes of an `.idx` whose documents are one sequence each; `lengths` [documents], in tokens."""
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, "<i8"), ends[:-1]])
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, _CODE_OF[dtype], len(lengths), len(documents))
    return b"".join([header, lengths.astype("<i4").tobytes(), pointers.tobytes(), documents.tobytes()])


def described(reader: IndexedReader, name: str) -> Shard:
    """Counts, sizes and checksums of a finished pair under `name`; reads every byte of both files."""
    return Shard(
        name=name, documents=reader.document_count, tokens=len(reader.tokens), bin_bytes=reader.bin_bytes,
        idx_bytes=reader.idx_bytes, bin_sha256=sha256_of(reader.bin_path), idx_sha256=sha256_of(reader.idx_path),
    )  # fmt: skip
