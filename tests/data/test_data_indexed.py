"""The shard format, against bytes packed here by hand from Megatron-LM's definition."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from qatscale.data.indexed import IndexedReader
from qatscale.data.indexed_writer import IndexedWriter, encode_index, token_dtype
from qatscale.errors import UserError
from tests.data.data_corpora import documents_of

LENGTHS = [3, 1, 4]
TOKENS = [5, 6, 2, 2, 7, 8, 9, 2]


def megatron_pair(prefix: Path, code: int, form: str, tokens: list[int], lengths: list[int]) -> None:
    """What Megatron-LM's IndexedDatasetBuilder writes for documents of one sequence each."""
    width = struct.calcsize("<" + form)
    prefix.with_name(prefix.name + ".bin").write_bytes(struct.pack(f"<{len(tokens)}{form}", *tokens))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(lengths) + 1)
    index += struct.pack(f"<{len(lengths)}i", *lengths)
    starts = [sum(lengths[:i]) * width for i in range(len(lengths))]
    index += struct.pack(f"<{len(lengths)}q", *starts)
    index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    prefix.with_name(prefix.name + ".idx").write_bytes(index)


def written(prefix: Path, dtype: np.dtype) -> tuple[bytes, bytes]:
    writer = IndexedWriter(prefix, dtype)
    writer.add(np.array(TOKENS[:4]), np.array(LENGTHS[:2]))
    writer.add(np.array(TOKENS[4:]), np.array(LENGTHS[2:]))
    files = writer.finish()
    data, index = (prefix.with_name(prefix.name + ending).read_bytes() for ending in (".bin", ".idx"))
    assert (files.documents, files.tokens, files.bin_bytes, files.idx_bytes) == (3, 8, len(data), len(index))
    assert files.bin_sha256 == hashlib.sha256(data).hexdigest()
    assert files.idx_sha256 == hashlib.sha256(index).hexdigest()
    return data, index


@pytest.mark.parametrize(("vocab_size", "code", "form"), [(65_499, 8, "H"), (65_500, 4, "i")])
def test_written_shard_is_megatrons_byte_for_byte(tmp_path: Path, vocab_size: int, code: int, form: str) -> None:
    ours = written(tmp_path / "ours", token_dtype(vocab_size))
    megatron_pair(tmp_path / "theirs", code, form, TOKENS, LENGTHS)
    assert ours == ((tmp_path / "theirs.bin").read_bytes(), (tmp_path / "theirs.idx").read_bytes())
    assert len(list(tmp_path.iterdir())) == 4, "a temporary file stayed"


@pytest.mark.parametrize(("code", "form"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_reads_every_integer_dtype(tmp_path: Path, code: int, form: str) -> None:
    megatron_pair(tmp_path / "x", code, form, TOKENS, LENGTHS)
    reader = IndexedReader(tmp_path / "x")
    assert reader.tokens.tolist() == TOKENS
    assert reader.lengths.tolist() == LENGTHS
    assert reader.documents.tolist() == [0, 1, 2, 3]
    assert [document.tolist() for document in documents_of(reader)] == [[5, 6, 2], [2], [7, 8, 9, 2]]
    reader.check_contiguous()


def overwrite(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: overwrite(p / "x.idx", 0, b"MMIDIDY"), "starts with"),
        (lambda p: overwrite(p / "x.idx", 9, struct.pack("<Q", 2)), "index version 2"),
        (lambda p: overwrite(p / "x.idx", 17, b"\x09"), "dtype code 9"),
        (lambda p: overwrite(p / "x.idx", 17, b"\x07"), "dtype code 7"),
        (lambda p: (p / "x.idx").write_bytes((p / "x.idx").read_bytes()[:20]), "cut off within its header"),
        (lambda p: (p / "x.idx").write_bytes((p / "x.idx").read_bytes()[:-1]), "its header says"),
        (lambda p: (p / "x.idx").write_bytes((p / "x.idx").read_bytes() + b"\0"), "its header says"),
        (lambda p: (p / "x.bin").write_bytes((p / "x.bin").read_bytes()[:-2]), "its index says 16"),
        (lambda p: (p / "x.bin").write_bytes((p / "x.bin").read_bytes() + b"\0\0"), "its index says 16"),
        (lambda p: (p / "x.bin").unlink(), "missing"),
        (lambda p: (p / "x.idx").unlink(), "missing"),
        (lambda p: megatron_pair(p / "x", 8, "H", [], []), "no documents"),
    ],
)
def test_refuses_a_damaged_pair(tmp_path: Path, damage, said: str) -> None:
    megatron_pair(tmp_path / "x", 8, "H", TOKENS, LENGTHS)
    IndexedReader(tmp_path / "x")
    damage(tmp_path)
    with pytest.raises(UserError, match=said):
        IndexedReader(tmp_path / "x")


def test_refuses_sequences_out_of_order_as_a_stream(tmp_path: Path) -> None:
    megatron_pair(tmp_path / "x", 8, "H", TOKENS, LENGTHS)
    overwrite(tmp_path / "x.idx", 34 + 12, struct.pack("<2q", 6, 0))
    with pytest.raises(UserError, match="one after another"):
        IndexedReader(tmp_path / "x").check_contiguous()


def resident(path: Path) -> set[int]:
    """Pages of a file that are in memory, by mincore(2)."""
    mapped = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    address, out = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), out) == 0
    return set(np.flatnonzero(pages & 1).tolist())


def test_prefetch_reads_these_pages_and_no_others(tmp_path: Path) -> None:
    page = mmap.PAGESIZE // 2  # in tokens
    count = 4096 * page + 100
    (tmp_path / "x.bin").write_bytes(np.arange(count, dtype="<u2").tobytes())
    (tmp_path / "x.idx").write_bytes(encode_index(np.array([count]), np.dtype("<u2")))
    with (tmp_path / "x.bin").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(tmp_path / "x.bin"):
        pytest.skip("this file system lies in memory")
    reader = IndexedReader(tmp_path / "x")
    for start, length in ((page - 1, 2), (1000 * page + 5, 2 * page), (4096 * page - 1, 1000)):
        reader.prefetch(start, length)
    wanted, deadline = {0, 1, 1000, 1001, 1002, 4095, 4096}, time.monotonic() + 20
    while resident(tmp_path / "x.bin") != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(tmp_path / "x.bin") == wanted
