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

import copy
import hashlib
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from qatscale.errors import UserError
from qatscale.files import PARTIAL, Count, rename_synced, sha256_of, write_atomic

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
_CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}
SMALL_VOCABULARY = 65_500
"""Vocabularies below this size are stored in 16 bits, as in Megatron-LM."""
PREPARE_AGAIN = "Copy it again, or run `qatscale prepare` again with --restart."
WRITE_AGAIN = "Copy both files again, or write them again with the tool that made them."
"""For shards from elsewhere, which `qatscale prepare` cannot make."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else int32."""
    return np.dtype("<u2") if vocab_size < SMALL_VOCABULARY else np.dtype("<i4")


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
            name=self._name,
            documents=len(lengths),
            tokens=self.tokens,
            bin_bytes=self.tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )


def encode_index(lengths: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    """The bytes of an `.idx` whose documents are one sequence each; `lengths` [documents], in tokens."""
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, "<i8"), ends[:-1]])
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, _CODE_OF[dtype], len(lengths), len(documents))
    return b"".join([header, lengths.astype("<i4").tobytes(), pointers.tobytes(), documents.tobytes()])


class IndexedReader:
    """One shard, memory-mapped: opening costs the same for any size.

    `tokens` [all tokens], `lengths` [S], `pointers` [S], `documents` [D] are read-only views of the files.
    Raises UserError for a missing file, a wrong magic number or version, and a dtype that holds no tokens. Also for a
    truncated index, and for a `.bin` whose size is not what the index says.
    """

    def __init__(self, prefix: Path, fix: str = PREPARE_AGAIN) -> None:
        """`fix`: what errors advise, PREPARE_AGAIN or WRITE_AGAIN."""
        self._fix = fix
        self.bin_path, self.idx_path = (prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx"))
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError("shard", str(path), "the file is missing.", self._fix)
        self.dtype, sequences, documents = self._read_header()
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        bounds = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * documents])
        self.lengths = index[bounds[0] : bounds[1]].view("<i4")
        self.pointers = index[bounds[1] : bounds[2]].view("<i8")
        self.documents = index[bounds[2] : bounds[3]].view("<i8")
        self._check_bin_size()
        with self.bin_path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens = np.frombuffer(self._map, self.dtype)  # a slice of a np.memmap costs several times as much
        self._start = 0

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        with self.idx_path.open("rb") as file:
            raw = file.read(HEADER.size)
        if not raw.startswith(MAGIC):
            raise UserError("shard", str(self.idx_path), f"starts with {raw[:9]!r}, not with {MAGIC!r}.")
        if len(raw) < HEADER.size:
            raise UserError("shard", str(self.idx_path), "is cut off within its header.", self._fix)
        _, version, code, sequences, documents = HEADER.unpack(raw)
        if version != VERSION:
            raise UserError(
                "shard", str(self.idx_path), f"has index version {version}; only version {VERSION} is supported."
            )
        dtype = DTYPE_CODES.get(code)
        if dtype is None or dtype.kind == "f":
            kinds = ", ".join(f"{c} = {d.name}" for c, d in DTYPE_CODES.items() if d.kind != "f")
            raise UserError("shard", str(self.idx_path), f"has dtype code {code}; tokens need one of {kinds}.")
        size, expected = self.idx_path.stat().st_size, HEADER.size + 12 * sequences + 8 * documents
        if size != expected:
            problem = f"has {size:,} bytes, and its header says {expected:,}."
            raise UserError("shard", str(self.idx_path), problem, self._fix)
        if sequences == 0:
            raise UserError("shard", str(self.idx_path), "holds no documents.")
        return dtype, sequences, documents

    def _check_bin_size(self) -> None:
        size = self.bin_path.stat().st_size
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if expected == 0:
            raise UserError("shard", str(self.idx_path), "holds no tokens.")
        if size == expected:
            return
        tokens, rest = divmod(abs(size - expected), self.dtype.itemsize)
        apart = f"{abs(size - expected):,} bytes" if rest else f"{tokens:,} token{'s' * (tokens != 1)}"
        problem = f"index and data disagree by {apart}: it has {size:,} bytes, and its index says {expected:,}."
        if size > expected and not rest and tokens == len(self.documents) - 1:
            problem += " It is one token a document: probably the index leaves out end-of-document tokens, as an old"
            problem += " preprocess_data.py of Megatron-LM did (its issue 431)."
            raise UserError("shard", str(self.bin_path), problem, "Tokenize again with a later version of the tool.")
        raise UserError("shard", str(self.bin_path), problem, self._fix)

    def prefetch(self, start: int, count: int) -> None:
        """Ask the system to read tokens [start, start + count) from the disk, without waiting for them."""
        start += self._start
        first, end = start * self.dtype.itemsize, min((start + count) * self.dtype.itemsize, len(self._map))
        page = first - first % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def check_contiguous(self) -> None:
        """Raise UserError unless the sequences fill the `.bin` in order, which a flat token stream relies on."""
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        if self.pointers[0] != 0 or (self.pointers[1:] != ends[:-1]).any() or (self.lengths < 0).any():
            raise UserError("shard", str(self.idx_path), "its sequences are not one after another in the .bin.")

    def stretch(self, start: int, count: int) -> IndexedReader:
        """The same files with `tokens` [start, start + count) only."""
        part = copy.copy(self)
        part.tokens, part._start = self.tokens[start : start + count], start
        return part

    def shard(self, name: str) -> Shard:
        """Counts, sizes and checksums under `name`; reads every byte of both files."""
        return Shard(
            name=name,
            documents=len(self.documents) - 1,
            tokens=len(self.tokens),
            bin_bytes=self.bin_path.stat().st_size,
            idx_bytes=self.idx_path.stat().st_size,
            bin_sha256=sha256_of(self.bin_path),
            idx_sha256=sha256_of(self.idx_path),
        )
