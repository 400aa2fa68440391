"""The Megatron indexed-dataset format: one pair of files per shard.

`NAME.bin` holds token ids one after another, `NAME.idx` says where each sequence starts (little-endian throughout):

    9 bytes   b"MMIDIDX\\x00\\x00"
    uint64    version, 1
    uint8     dtype code of the tokens (`DTYPE_CODES`)
    uint64    number of sequences, S
    uint64    length of document_indices, D
    int32[S]  sequence_lengths, in tokens
    int64[S]  sequence_pointers, byte offsets into the .bin
    int64[D]  document_indices: the first sequence of each document, then S

Megatron-LM, GPT-NeoX and NeMo read and write it. In shards written here a sequence is a document with its EOS.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict

from qatscale.errors import UserError
from qatscale.files import Count

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
PREPARE_AGAIN = "Copy it again, or run `qatscale prepare` again with --restart."
WRITE_AGAIN = "Copy both files again, or write them again with the tool that made them."
"""For shards from elsewhere, which `qatscale prepare` cannot make."""


class Shard(BaseModel):
    """One `.bin`/`.idx` pair, as the manifest lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """Path without ending, relative to the manifest's folder."""
    documents: Count
    tokens: Count
    start: Count = 0
    """First token. A split may hold a stretch of a file, of which other splits hold the rest."""
    bin_bytes: Count
    idx_bytes: Count
    bin_sha256: str
    idx_sha256: str


class IndexedReader:
    """One shard, memory-mapped: opening costs the same for any size, and one descriptor until the index is read.

    `tokens` [all tokens], `lengths` [S], `pointers` [S], `documents` [D] are read-only views of the files.
    Raises UserError for a missing file, a wrong magic number or version, and a dtype that holds no tokens. Also for a
    truncated index, and for a `.bin` whose size is not what the index says.
    """

    def __init__(self, prefix: Path, fix: str = PREPARE_AGAIN) -> None:
        """`fix`: what errors advise, PREPARE_AGAIN or WRITE_AGAIN."""
        self.fix = fix
        self.bin_path, self.idx_path = (prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx"))
        try:
            with self.idx_path.open("rb") as index, self.bin_path.open("rb") as data:
                self.idx_bytes, self.bin_bytes = os.fstat(index.fileno()).st_size, os.fstat(data.fileno()).st_size
                self.dtype, self._sequences, self._documents = self._read_header(index.read(HEADER.size))
                self._check_bin_size(index)
                self._map = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ)  # the one descriptor that stays
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError("shard", str(error.filename), "the file is missing.", self.fix) from None
        self.tokens = np.frombuffer(self._map, self.dtype)  # a slice of a np.memmap costs several times as much

    @property
    def document_count(self) -> int:
        """By the header."""
        return self._documents - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return self._part("<i4", HEADER.size, self._sequences)

    @functools.cached_property
    def pointers(self) -> np.ndarray:
        return self._part("<i8", HEADER.size + 4 * self._sequences, self._sequences)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        return self._part("<i8", HEADER.size + 12 * self._sequences, self._documents)

    def _part(self, dtype: str, offset: int, count: int) -> np.ndarray:
        return np.memmap(self.idx_path, dtype, "r", offset, count)

    def _read_header(self, raw: bytes) -> tuple[np.dtype[Any], int, int]:
        if not raw.startswith(MAGIC):
            raise UserError("shard", str(self.idx_path), f"starts with {raw[:9]!r}, not with {MAGIC!r}.")
        if len(raw) < HEADER.size:
            raise UserError("shard", str(self.idx_path), "is cut off within its header.", self.fix)
        _, version, code, sequences, documents = HEADER.unpack(raw)
        if version != VERSION:
            raise UserError(
                "shard", str(self.idx_path), f"has index version {version}; only version {VERSION} is supported."
            )
        dtype = DTYPE_CODES.get(code)
        if dtype is None or dtype.kind == "f":
            kinds = ", ".join(f"{c} = {d.name}" for c, d in DTYPE_CODES.items() if d.kind != "f")
            raise UserError("shard", str(self.idx_path), f"has dtype code {code}; tokens need one of {kinds}.")
        expected = HEADER.size + 12 * sequences + 8 * documents
        if self.idx_bytes != expected:
            problem = f"has {self.idx_bytes:,} bytes, and its header says {expected:,}."
            raise UserError("shard", str(self.idx_path), problem, self.fix)
        if sequences == 0:
            raise UserError("shard", str(self.idx_path), "holds no documents.")
        return dtype, sequences, documents

    def _check_bin_size(self, index: BinaryIO) -> None:
        def last(form: str, end: int) -> int:
            index.seek(end - struct.calcsize(form))
            return int(struct.unpack(form, index.read(struct.calcsize(form)))[0])

        size, of_lengths = self.bin_bytes, HEADER.size + 4 * self._sequences
        length, pointer = last("<i", of_lengths), last("<q", of_lengths + 8 * self._sequences)
        expected = pointer + length * self.dtype.itemsize
        if expected == 0:
            raise UserError("shard", str(self.idx_path), "holds no tokens.")
        if size == expected:
            return
        tokens, rest = divmod(abs(size - expected), self.dtype.itemsize)
        apart = f"{abs(size - expected):,} bytes" if rest else f"{tokens:,} token{'s' * (tokens != 1)}"
        problem = f"index and data disagree by {apart}: it has {size:,} bytes, and its index says {expected:,}."
        if size > expected and not rest and tokens == self._documents - 1:
            problem += " It is one token a document: probably the index leaves out end-of-document tokens, as an old"
            problem += " preprocess_data.py of Megatron-LM did (its issue 431)."
            raise UserError("shard", str(self.bin_path), problem, "Tokenize again with a later version of the tool.")
        raise UserError("shard", str(self.bin_path), problem, self.fix)

    def prefetch(self, start: int, count: int) -> None:
        """Ask the system to read tokens [start, start + count) from the disk, without waiting for them."""
        first, end = start * self.dtype.itemsize, min((start + count) * self.dtype.itemsize, len(self._map))
        page = first - first % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def check_contiguous(self) -> None:
        """Raise UserError unless the sequences fill the `.bin` in order, which a flat token stream relies on."""
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        if self.pointers[0] != 0 or (self.pointers[1:] != ends[:-1]).any() or (self.lengths < 0).any():
            raise UserError("shard", str(self.idx_path), "its sequences are not one after another in the .bin.")
        first, last = (self.documents[0], self.documents[-1]) if self._documents else (-1, -1)
        if first < 0 or last > self._sequences or (np.diff(self.documents) < 0).any():
            raise UserError("shard", str(self.idx_path), "its documents are not groups of its sequences.", self.fix)
