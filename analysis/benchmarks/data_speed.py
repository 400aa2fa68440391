"""Text to tokens, tokens to batches, and how long opening a billion tokens takes. See data_speed.md.

python analysis/benchmarks/data_speed.py [--text TEXT] [--workers N] [--peers] [--out FILE]
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from measure import Skipped, Variant, interleaved
from result import Result, Table, options_of, report

from qatscale.data.indexed import IndexedReader
from qatscale.data.indexed_writer import described, encode_index, token_dtype
from qatscale.data.manifest import Manifest, SplitCounts, TokenizerCard, Verify
from qatscale.data.reader import BatchReader, TokenStream
from qatscale.data.sources import SourceOptions, open_source
from qatscale.data.tokenizer import SENTENCEPIECE_FILE, train_sentencepiece

OURS = "qatscale prepare"
PEERS = Path(__file__).with_name("data_peers.py")
_SLICES = "slices of a memory map"
_SEQUENCE, _ROWS = 1024, 16
"""Tokens a sequence and sequences a batch, of the tables that read."""
_VOCABULARY, _QUICK_VOCABULARY, _SAMPLE = 32_000, 300, 8_000_000


def run(*, peers: bool, workers: int | None, quick: bool, text: str | None = None) -> Result:
    """`text`: what `qatscale prepare` takes as a source; None = the embedded corpus. `workers`: None = all cores."""
    size = 500_000 if quick else 32_000_000
    rounds = 1 if quick else 5
    workers = workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = _write_text(text or f"self:{size}", folder / "text.jsonl", size)
        model = folder / "tokenizer.model"
        _train(folder / "text.jsonl", model, _QUICK_VOCABULARY if quick else _VOCABULARY)
        tables = [
            _prepare(folder, workers, rounds, peers),
            *_read(folder / OURS.replace(" ", "-"), 2 if quick else 20, peers),
            _read_cold(folder / "cold", 10**6 if quick else 10**9, rounds),
            _open(folder / "billion", 10**7 if quick else 10**9, 2 if quick else 7),
        ]
    settings = {"text": Path(text).name if text else "self", "MB": written / 1e6, "processes": workers, "quick": quick}
    return Result("data", settings, tables)


def _write_text(source: str, path: Path, size: int) -> int:
    """The first documents of `source`, up to `size` characters; returns their bytes in UTF-8."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in open_source(source, SourceOptions()).sample(size):
            if text and not text.isspace():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
    return written


def _train(text: Path, model: Path, vocabulary: int) -> None:
    trained = train_sentencepiece(open_source(str(text), SourceOptions()).sample(_SAMPLE), vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        trained.save(Path(folder) / "saved")
        shutil.copyfile(Path(folder) / "saved" / SENTENCEPIECE_FILE, model)


# --- text to tokens ---


def _prepare(folder: Path, workers: int, rounds: int, peers: bool) -> Table:
    text, model = str(folder / "text.jsonl"), str(folder / "tokenizer.model")
    main = "import sys; from qatscale.cli import main; main()"
    commands = {
        OURS: lambda out: [sys.executable, "-c", main, "prepare", text, "--out", str(out), "--tokenizer", model,
                           "--workers", str(workers)],
    }  # fmt: skip
    if peers:
        for name, key in (("datasets.map, fast tokenizer", "datasets"), ("SentencePiece, Megatron-style", "megatron")):
            commands[name] = functools.partial(_peer_command, key, text, model, workers)
    peaks: dict[str, list[float]] = {name: [] for name in commands}

    def whole(name: str) -> None:
        out = folder / name.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        peaks[name].append(_run(commands[name](out)))

    variants = [Variant(name, functools.partial(whole, name)) for name in commands]
    seconds = interleaved(variants, rounds, warmup=0)
    manifest = Manifest.load(folder / OURS.replace(" ", "-"))
    tokens = sum(counts.tokens for counts in manifest.splits.values())
    variants = [Variant(variant.name, variant.run, tokens) for variant in variants]
    skipped = [] if peers else [Skipped("other ways", "run with --peers")]
    notes = ["Whole commands, from start to the last file on the disk; all give the same tokens."]
    extra = {name: {"peak MiB": max(found) / 2**20} for name, found in peaks.items()}
    return Table.of("Text to tokens", "tokens", variants, seconds, reference=OURS, skipped=skipped, notes=notes,
                    extra=extra)  # fmt: skip


def _peer_command(key: str, text: str, model: str, workers: int, out: Path) -> list[str]:
    return [sys.executable, str(PEERS), key, text, str(out), model, str(workers)]


def _run(command: Sequence[str]) -> float:
    """Run a command; the largest memory that it and its children held together, shared pages counted once, in bytes."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        peak = 0.0

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                peak = max(peak, _memory(process.pid))
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        watcher.join()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command} failed:\n{said.read()[-2000:]}")
    return peak


def _memory(pid: int) -> float:
    total = 0
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0.0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, OSError):
            continue  # it has just ended
    return float(total)


# --- tokens to batches ---


def _read(folder: Path, rounds: int, peers: bool) -> list[Table]:
    """Batches in order of the steps, and at steps drawn at random."""
    stream = TokenStream.open(folder, "train", "size")
    rows = min(_ROWS, stream.sequences(_SEQUENCE))
    reader = BatchReader({"": stream}, _SEQUENCE, rows, seed=0)
    steps = min(100, stream.sequences(_SEQUENCE) // rows)
    counts = Manifest.load(folder).splits["train"]
    flat = np.memmap(folder / f"{counts.shards[0].name}.bin", dtype=Manifest.load(folder).dtype, mode="r")
    whole = (len(flat) - 1) // _SEQUENCE
    draw = np.random.default_rng(0)
    orders = {"in order": np.arange(steps), "at random": draw.integers(0, stream.sequences(_SEQUENCE) // rows, steps)}
    hugging_face = _as_dataset(flat, whole) if peers else None
    tables = []
    for order, chosen in orders.items():
        ours = functools.partial(_batches, reader, chosen)
        starts = (chosen[:, None] * rows + np.arange(rows)) % whole * _SEQUENCE
        if order == "at random":
            starts = draw.permutation(starts.ravel()).reshape(starts.shape)
        plain = functools.partial(_slices, flat, starts)
        amount = steps * rows * _SEQUENCE
        variants = [Variant("BatchReader", ours, amount), Variant(_SLICES, plain, amount)]
        if hugging_face is not None:
            theirs = functools.partial(_rows_of, hugging_face, starts // _SEQUENCE, order == "in order")
            variants.append(Variant("datasets, torch format", theirs, amount))
        notes = [f"{rows} sequences of {_SEQUENCE} tokens a batch, as int64; the files are in the page cache."]
        seconds = interleaved(variants, rounds)
        tables.append(Table.of(f"Tokens to batches, {order}", "tokens", variants, seconds, reference=_SLICES,
                               notes=notes))  # fmt: skip
    return tables


def _batches(reader: BatchReader, steps: np.ndarray) -> None:
    for step in steps.tolist():
        reader.batch(step)


def _slices(flat: np.ndarray, starts: np.ndarray) -> None:
    """What a training script of a few lines does: cut each row out of the file and stack them."""
    for batch in starts.tolist():
        np.stack([flat[start : start + _SEQUENCE + 1].astype(np.int64) for start in batch])


def _as_dataset(flat: np.ndarray, count: int) -> object:
    """The same sequences as a `datasets.Dataset` that gives torch tensors."""
    import datasets

    rows = [flat[i * _SEQUENCE : (i + 1) * _SEQUENCE + 1].astype(np.int32) for i in range(count)]
    kind = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=_SEQUENCE + 1)})
    return datasets.Dataset.from_dict({"input_ids": rows}, features=kind).with_format("torch")


def _rows_of(dataset: object, rows: np.ndarray, in_order: bool) -> None:
    if in_order:
        for number, _ in enumerate(dataset.iter(rows.shape[1]), start=1):  # type: ignore[attr-defined]
            if number == len(rows):
                return
    for batch in rows.tolist():
        dataset[batch]  # type: ignore[index]


def _read_cold(folder: Path, tokens: int, rounds: int) -> Table:
    """Random batches of a file of which nothing is in the page cache, as of a corpus larger than the memory."""
    _write_empty(folder, tokens, shards=1)
    path = folder / "train-00000.bin"
    draw = np.random.default_rng(0)
    with path.open("r+b") as file:
        for _ in range(tokens // 10**6):
            file.write(draw.integers(0, _VOCABULARY, 10**6, np.uint16).tobytes())
        file.flush()
        os.fsync(file.fileno())
    batches = 50
    starts = draw.integers(0, tokens // _SEQUENCE - 1, (batches, _ROWS)) * _SEQUENCE

    def ours() -> None:
        _evict(path)
        reader = BatchReader({"": TokenStream.open(folder, "train", "size")}, _SEQUENCE, _ROWS, seed=0)
        _batches(reader, np.arange(batches))

    def plain() -> None:
        _evict(path)
        _slices(np.memmap(path, dtype="<u2", mode="r"), starts)

    amount = batches * _ROWS * _SEQUENCE
    variants = [Variant("BatchReader", ours, amount), Variant(_SLICES, plain, amount)]
    notes = [f"{batches} batches of {_ROWS} sequences of {_SEQUENCE} of {tokens:,} tokens; opening is included."]
    return Table.of("Tokens to batches, at random, from the disk", "tokens", variants,
                    interleaved(variants, rounds, warmup=1), reference=_SLICES, notes=notes)  # fmt: skip


def _evict(path: Path) -> None:
    """Drop a file that nobody maps from the page cache; a file system in memory keeps it."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- opening ---


def _open(folder: Path, tokens: int, rounds: int) -> Table:
    """Open a data set of so many tokens (of files with holes) and read one batch from its middle."""
    _write_empty(folder, tokens)
    process = psutil.Process()

    def ours(verify: Verify) -> None:
        stream = TokenStream.open(folder, "train", verify)
        BatchReader({"": stream}, _SEQUENCE, _ROWS, seed=0).batch(300)

    before = process.memory_full_info().uss
    ours("size")
    held = (process.memory_full_info().uss - before) / 2**20
    flat = functools.partial(_one_batch, folder)
    variants = [
        Variant('verify="size"', functools.partial(ours, "size"), tokens),
        Variant('verify="auto": every byte below 4 GiB', functools.partial(ours, "auto"), tokens),
        Variant(_SLICES, flat, tokens),
    ]
    notes = [f"{tokens:,} tokens in {tokens // 1000:,} documents; opening and one batch of a random order."]
    return Table.of("Opening", "tokens", variants, interleaved(variants, rounds, warmup=1), reference=_SLICES,
                    notes=notes, extra={'verify="size"': {"MiB held": held}})  # fmt: skip


def _one_batch(folder: Path) -> None:
    flat = np.memmap(folder / "train-00000.bin", dtype="<u2", mode="r")
    _slices(flat, np.arange(_ROWS)[None] * _SEQUENCE + len(flat) // 2)


def _write_empty(folder: Path, tokens: int, shards: int = 4) -> None:
    """A data set of zeros, in documents of 1,000 tokens; the `.bin` files take no space on the disk."""
    folder.mkdir()
    dtype = token_dtype(_VOCABULARY)
    size = tokens // shards
    index = encode_index(np.full(size // 1000, 1000), dtype)
    for number in range(shards):
        path = folder / f"train-{number:05d}.bin"
        with path.open("wb") as file:
            file.truncate(size * dtype.itemsize)
        path.with_suffix(".idx").write_bytes(index)
    first = described(IndexedReader(folder / "train-00000"), "train-00000")
    made = [first.model_copy(update={"name": f"train-{number:05d}"}) for number in range(shards)]
    counts = SplitCounts(documents=size // 1000 * shards, tokens=size * shards, text_bytes=None, shards=made)
    card = TokenizerCard(kind="unknown", fingerprint=None, vocab_size=_VOCABULARY, eos_id=None, folder=None)
    Manifest(qatscale="0", dtype=dtype.name, tokenizer=card, sources=[], identity={}, empty_documents=0,
             splits={"train": counts}).save(folder)  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--text", help="as `qatscale prepare` takes it: a file or a folder (default: the embedded one)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    options = parser.parse_args(given)
    report(run(peers=options.peers, workers=options.workers, quick=options.quick, text=options.text), options)


if __name__ == "__main__":
    main()
