"""Streams, the shuffled order, batches and evaluation, against plain Python."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from qatscale.data.indexed_writer import IndexedWriter
from qatscale.data.manifest import Manifest, SplitCounts, TokenizerCard
from qatscale.data.open import repetition
from qatscale.data.prepare import prepare
from qatscale.data.reader import BatchReader, EvaluationReader, ReshuffledTail, ShuffledOrder, TokenStream
from qatscale.errors import UserError
from tests.data.data_corpora import documents, stream, stream_of, write_jsonl


def counting(tokens: int, *cuts: int) -> TokenStream:
    """A stream whose token at position p is p, in shards cut there."""
    return stream(*np.split(np.arange(tokens, dtype=np.int32), cuts))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_a_sequence_is_a_slice_across_shards(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes)
    length = data.draw(st.integers(0, total - 1))
    index = data.draw(st.integers(0, (total - 1) // length - 1)) if length else 0
    (row,) = counting(total, *itertools.accumulate(sizes[:-1])).gather(np.array([index]), length)
    assert row.dtype == np.int64
    assert row.tolist() == list(range(index * length, index * length + length + 1))


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(-3, 2**70), st.data())
def test_every_epoch_is_a_permutation(sequences: int, seed: int, data: st.DataObject) -> None:
    order = ShuffledOrder(sequences, seed)
    seen = order(0, 3 * sequences)
    for epoch in range(3):
        assert sorted(seen[epoch * sequences : (epoch + 1) * sequences].tolist()) == list(range(sequences))
    first = data.draw(st.integers(0, 3 * sequences - 1))
    count = data.draw(st.integers(1, 3 * sequences - first))
    assert (ShuffledOrder(sequences, seed)(first, count) == seen[first : first + count]).all(), "found on its own"


def test_positions_are_found_alike_in_any_pieces() -> None:
    """An order draws positions in blocks; a piece may lie in one, cross two or hold several."""
    whole = ShuffledOrder(1500, 7)(0, 4096)
    for length in (1, 7, 16, 1000, 1024, 1500):
        pieces, order = range(0, 4096, length), ShuffledOrder(1500, 7)
        assert (np.concatenate([order(first, length) for first in pieces])[:4096] == whole).all()


def test_seeds_and_epochs_differ_and_shuffle() -> None:
    orders = [ShuffledOrder(1000, seed)(0, 2000) for seed in (0, 1)]
    parts = [order[half] for order in orders for half in (slice(0, 1000), slice(1000, 2000))]
    for a, b in itertools.combinations([*parts, np.arange(1000)], 2):
        # Random permutations agree in one place on average.
        assert (a == b).sum() < 15


@pytest.mark.parametrize(("sequences", "positions"), [(2, 2), (4, 4), (5, 5), (12, 2), (16, 2)])
def test_all_orders_are_equally_likely(sequences: int, positions: int) -> None:
    """What the first positions hold, over 100 seeds for each possible outcome, against the uniform distribution."""
    outcomes = list(itertools.permutations(range(sequences), positions))
    seeds = range(100 * len(outcomes))
    counts = Counter(tuple(ShuffledOrder(sequences, seed)(0, positions).tolist()) for seed in seeds)
    assert chisquare([counts[outcome] for outcome in outcomes]).pvalue > 1e-3


def test_the_order_is_written_down() -> None:
    """The definition once more, in Python's integers, for one short epoch."""
    sequences, side, seed, epoch = 19, 5, 3, 1
    bits = iter(np.random.Philox(key=[seed, epoch]).random_raw(4 * 2 * side).tolist())
    rounds = [([next(bits) % side for _ in range(side)], [next(bits) % side for _ in range(side)]) for _ in range(4)]

    def permute(cell: int) -> int:
        row, column = divmod(cell, side)
        for down, right in rounds:
            row = (row + down[column]) % side
            column = (column + right[row]) % side
        cell = row * side + column
        return cell if cell < sequences else permute(cell)

    assert ShuffledOrder(sequences, seed)(19, 19).tolist() == [permute(place) for place in range(sequences)]


@given(st.integers(1, 60), st.integers(0, 200), st.integers(0, 3))
def test_a_reshuffled_tail_reads_what_the_epoch_has_left(sequences: int, start: int, seed: int) -> None:
    """Every epoch still reads each sequence once; up to the tail's start the order is the old one; positions are read
    alike in one piece and one by one."""
    old = ShuffledOrder(sequences, 5)
    tail = ReshuffledTail(old, sequences, start, seed)
    end = (start // sequences + 3) * sequences
    read = tail(0, end)
    assert not start or (read[:start] == old(0, start)).all()
    assert (np.sort(read.reshape(-1, sequences)) == np.arange(sequences)).all()
    assert [int(tail(place, 1)[0]) for place in range(end)] == read.tolist()


def test_the_seed_of_a_cooldown_changes_its_data_alone() -> None:
    """A draw of 20 from the 60 sequences that are left, another one for each seed."""
    readers = [BatchReader({"": counting(1001)}, 10, 5, 7, tail) for tail in (None, (8, 1), (8, 2))]
    before, after = (
        [np.concatenate([r.batch(s)[:, 0] for s in steps]) for r in readers] for steps in (range(8), range(8, 12))
    )
    assert all((part == before[0]).all() for part in before)
    assert len({tuple(sorted(part.tolist())) for part in after}) == 3
    assert all(not set(part) & set(before[0]) and len(set(part)) == 20 for part in after)


def test_batches_are_windows_of_the_stream() -> None:
    reader = BatchReader({"": counting(101, 33, 34)}, sequence_length=10, sequences=5, seed=1)
    seen = np.concatenate([reader.batch(step) for step in range(2)])
    assert seen.shape == (10, 11)
    assert sorted(seen[:, 0].tolist()) == list(range(0, 100, 10))
    assert (seen - seen[:, :1] == np.arange(11)).all(), "a sequence is T + 1 neighbouring tokens"


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_only_split_the_batch(ranks: int) -> None:
    one = BatchReader({"": counting(1000, 400)}, 7, 6, seed=5)
    for step in (0, 22, 23, 24, 500):  # the epoch ends within step 23: 142 sequences, 6 a step
        parts = [BatchReader({"": counting(1000, 400)}, 7, 6, 5).batch(step, rank, ranks) for rank in range(ranks)]
        assert (np.concatenate(parts) == one.batch(step)).all()


def test_epochs_run_on_through_a_batch() -> None:
    reader = BatchReader({"": counting(71)}, 10, 3, seed=0)
    starts = np.concatenate([reader.batch(step)[:, 0] for step in range(7)]) // 10
    for epoch in range(3):
        assert sorted(starts[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))


def test_data_that_repeat_are_reported() -> None:
    assert repetition("", 1, 100) is None
    assert repetition("", 1.5, 100) == "the data repeat: 1.50 epochs of 100 tokens"
    assert "code repeats: 4.50 epochs of 100 tokens; beyond about 4 epochs" in str(repetition("code", 4.5, 100))


def test_too_little_data() -> None:
    with pytest.raises(UserError, match="one sequence takes 11") as caught:
        BatchReader({"": counting(10)}, 10, 1, 0)
    assert caught.value.key == "data.sequence_length"
    assert BatchReader({"": counting(11)}, 10, 1, 0).batch(0).shape == (1, 11)
    with pytest.raises(UserError, match="holds 2 sequences of 10") as caught:
        BatchReader({"": counting(21)}, 10, 3, 0)
    assert caught.value.key == "batch.sequences"
    with pytest.raises(UserError, match="cannot be divided among 4"):
        BatchReader({"": counting(100)}, 10, 6, 0).batch(0, 0, 4)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_evaluation_weighs_every_sequence_once(sequences: int, micro_batch: int, ranks: int) -> None:
    reader = EvaluationReader(counting(401, 77), 10, sequences * 10 + 3, micro_batch)
    per_rank = [reader.batches(rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    counted = np.concatenate([b.tokens[: b.weight, 0] for batches in per_rank for b in batches])
    whole = EvaluationReader(counting(401), 10, sequences * 10, 40).batches()[0].tokens
    assert sorted(counted.tolist()) == whole[:, 0].tolist(), "the same ones for every number of ranks"
    for batch in itertools.chain(*per_rank):
        assert batch.tokens.shape in {(batch.weight, 11), (1, 11)}
        assert batch.weight <= micro_batch
    assert reader.tokens == sequences * 10

    def loss(rows: np.ndarray) -> float:  # a mean over tokens, as a model gives it
        return float(np.sin(rows[:, 1:]).mean())

    total = sum(b.weight * loss(b.tokens) for b in itertools.chain(*per_rank))
    expected = loss(whole)
    assert total / reader.sequences == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_evaluation_takes_what_there_is() -> None:
    assert EvaluationReader(counting(41), 10, 10**9, 4).sequences == 4
    assert EvaluationReader(counting(41), 10, 3, 4).sequences == 1
    with pytest.raises(UserError, match="one sequence takes"):
        EvaluationReader(counting(10), 10, 100, 4)


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_folder: Path) -> Path:
    source = write_jsonl(tmp_path / "a.jsonl", documents(60))
    prepare([str(source)], tmp_path / "data", tokenizer=str(tokenizer_folder), validation_fraction=0.2, workers=1)
    return tmp_path / "data"


def alter(path: Path) -> None:
    """Another byte in the middle, the size as before."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def edit(folder: Path, **changes: object) -> None:
    """Without its checksum, as former versions wrote manifests."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checksum": ""} | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged: its text"),
        (lambda f: edit(f, format=2), "is damaged: format"),
        (lambda f: alter(f / "manifest.json"), "was altered|is damaged"),
        (lambda f: edit(f, dtype="float32"), "not a dtype of tokens"),
        (lambda f: edit(f, dtype="int32"), "uint16, and the manifest says"),
        (lambda f: edit(f, splits={}), "no train split"),
        (lambda f: (f / "train-00000.bin").unlink(), "missing"),
        (lambda f: (f / "train-00000.bin").write_bytes((f / "train-00000.bin").read_bytes()[:-2]), "its index says"),
        (lambda f: alter(f / "train-00000.bin"), "checksum"),
        (lambda f: alter(f / "train-00000.idx"), "checksum"),
    ],
)
def test_damaged_folders_are_refused(prepared: Path, damage, said: str) -> None:
    TokenStream.open(prepared, "train")
    damage(prepared)
    with pytest.raises(UserError, match=said):
        TokenStream.open(prepared, "train")


def test_totals_and_ids_are_compared_with_the_shards(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    for what in ("tokens", "documents"):
        splits = {**manifest["splits"], "train": {**manifest["splits"]["train"], what: 10**9}}
        edit(prepared, splits=splits)
        with pytest.raises(UserError, match=rf"splits.train.{what} is 1,000,000,000, and its shards hold"):
            TokenStream.open(prepared, "train")
    shard = manifest["splits"]["train"]["shards"][0]
    edit(
        prepared,
        splits={**manifest["splits"], "train": {**manifest["splits"]["train"], "shards": [shard | {"start": 9}]}},
    )
    with pytest.raises(UserError, match=r"tokens of uint16, and the manifest says"):
        TokenStream.open(prepared, "train")
    raw = bytearray((prepared / "train-00000.bin").read_bytes())
    raw[40:42] = b"\xff\xff"
    (prepared / "train-00000.bin").write_bytes(raw)
    shard["bin_sha256"] = hashlib.sha256(raw).hexdigest()
    edit(prepared, splits=manifest["splits"])
    with pytest.raises(UserError, match="holds token id 65535; the vocabulary has 700"):
        TokenStream.open(prepared, "train")


def test_a_whole_shard_of_another_data_set_is_seen_by_its_size(prepared: Path) -> None:
    writer = IndexedWriter(prepared / "train-00000", np.dtype("<u2"))
    writer.add(np.arange(5), np.array([5]))
    writer.finish()
    with pytest.raises(UserError, match="the manifest says"):
        TokenStream.open(prepared, "train", verify="size")


def test_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qatscale prepare"):
        TokenStream.open(tmp_path / "nowhere", "train")


def test_vocabulary_must_fit_the_model(prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    manifest.check_vocabulary(700)
    manifest.check_vocabulary(1024)
    with pytest.raises(UserError, match=r"vocabulary of the data, 700.*vocab_size=700") as caught:
        manifest.check_vocabulary(699)
    assert caught.value.key == "model.vocab_size"


def test_opening_a_billion_tokens_takes_no_scan(tmp_path: Path) -> None:
    """Sparse files of the right size: a scan of 2 GB could not be this fast."""
    tokens, length = 10**9, 1000
    prefix, count = tmp_path / "train-00000", tokens // length
    from qatscale.data.indexed import IndexedReader
    from qatscale.data.indexed_writer import encode_index

    prefix.with_name("train-00000.idx").write_bytes(encode_index(np.full(count, length), np.dtype("<u2")))
    with prefix.with_name("train-00000.bin").open("wb") as file:
        file.truncate(tokens * 2)
    start = time.perf_counter()
    shard = IndexedReader(prefix)
    reader = BatchReader({"": stream_of({"sparse": shard})}, 2048, 64, 0)
    batch = reader.batch(7_000)
    assert time.perf_counter() - start < 0.5
    assert batch.shape == (64, 2049)


def many_shards(folder: Path, count: int, tokens: int = 8) -> Path:
    """A data set of so many shards; token i of the stream is i."""
    folder.mkdir()
    shards = []
    for number in range(count):
        writer = IndexedWriter(folder / f"train-{number:05d}", np.dtype("<i4"))
        writer.add(np.arange(number * tokens, (number + 1) * tokens), np.array([tokens]))
        shards.append(writer.finish())
    counts = SplitCounts(documents=count, tokens=count * tokens, text_bytes=None, shards=shards)
    card = TokenizerCard(kind="unknown", fingerprint=None, vocab_size=count * tokens, eos_id=None, folder=None)
    Manifest(qatscale="0", dtype="int32", tokenizer=card, sources=[], identity={}, empty_documents=0,
             splits={"train": counts}).save(folder)  # fmt: skip
    return folder


def test_any_number_of_shards_is_read_through_few_descriptors(tmp_path: Path) -> None:
    """More shards than the limit lets a process open, in a process of its own."""
    folder = many_shards(tmp_path / "data", 320)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pathlib import Path
import numpy as np
import qatscale.data.reader as reader
stream = reader.TokenStream.open(Path({str(folder)!r}), "train", "size")
rows = stream.gather(np.random.default_rng(0).permutation(stream.sequences(16)), 16)
assert sorted(rows[:, 0].tolist()) == list(range(0, 16 * len(rows), 16))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_processes_that_trust_another_ask_for_no_file(tmp_path: Path) -> None:
    """One process a host looks at the files; what it would have found, the others find when they read."""
    folder = many_shards(tmp_path / "data", 3)
    for shard in range(2):
        (folder / f"train-{shard:05d}.bin").unlink()
    with pytest.raises(UserError, match="missing"):
        TokenStream.open(folder, "train", "size")
    stream = TokenStream.open(folder, "train", "trust")
    assert stream.gather(np.array([4]), 4)[0].tolist() == [16, 17, 18, 19, 20]
    with pytest.raises(UserError, match="missing"):
        stream.gather(np.array([0]), 4)
