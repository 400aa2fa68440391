"""Small texts and their files, made on the spot."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from qatscale.data.indexed import IndexedReader
from qatscale.data.indexed_writer import encode_index
from qatscale.data.manifest import Manifest, Shard, SplitCounts, TokenizerCard
from qatscale.data.reader import TokenStream

WORDS = [
    "".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 9)) for i in range(400)
] + ["naïve", "Ω", "42", "x_1", "(a,b)", "—", "日本"]  # fmt: skip


def documents(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Distinct documents with line breaks, runs of spaces and indentation."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        lines = [" " * draw.choice([0, 0, 4]) + " ".join(draw.choices(WORDS, k=12)) for _ in range(words // 12)]
        made.append(f"document {seed} {i}\n" + draw.choice(["\n", "\n\n", "  \n"]).join(lines))
    return made


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    """Compressed as the name says; .zst in several frames, as parallel compressors write it."""
    lines = [json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)]
    raw = "".join(lines).encode()
    half = len("".join(lines[: len(lines) // 2]).encode())
    if path.suffix == ".gz":
        raw = gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    elif path.suffix == ".xz":
        raw = lzma.compress(raw[:half]) + lzma.compress(raw[half:])
    elif path.suffix == ".zst":
        raw = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    path.write_bytes(raw)
    return path


def write_parquet(path: Path, texts: list[str | None], rows_per_group: int = 7) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=rows_per_group)
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def stream(*shards: np.ndarray) -> TokenStream:
    """A stream over these tokens, each array a shard that is one document."""
    with tempfile.TemporaryDirectory() as folder:  # a mapped file outlives its name
        readers = {str(number): _shard(Path(folder) / str(number), tokens) for number, tokens in enumerate(shards)}
    return stream_of(readers)


def stream_of(readers: dict[str, IndexedReader]) -> TokenStream:
    """A stream over these files, in order."""
    shards = [
        Shard(name=n, documents=1, tokens=len(r.tokens), bin_bytes=0, idx_bytes=0, bin_sha256="", idx_sha256="")
        for n, r in readers.items()
    ]
    manifest = Manifest(
        qatscale="0",
        dtype="uint16",
        tokenizer=TokenizerCard(kind="unknown", fingerprint=None, vocab_size=1 << 16, eos_id=None, folder=None),
        sources=[],
        identity={},
        empty_documents=0,
        splits={"train": SplitCounts(documents=0, tokens=0, text_bytes=0, shards=shards)},
    )
    return TokenStream(manifest, shards, lambda shard: readers[shard.name], "memory")


def _shard(prefix: Path, tokens: np.ndarray) -> IndexedReader:
    prefix.with_suffix(".bin").write_bytes(tokens.astype("<i4").tobytes())
    prefix.with_suffix(".idx").write_bytes(encode_index(np.array([len(tokens)]), np.dtype("<i4")))
    return IndexedReader(prefix)


def first_tokens(stream: TokenStream, count: int) -> np.ndarray:
    return stream.gather(np.zeros(1, np.int64), count - 1)[0]


def documents_of(reader: IndexedReader) -> list[np.ndarray]:
    """The sequences of a contiguous shard."""
    return np.split(reader.tokens, np.cumsum(reader.lengths)[:-1])
