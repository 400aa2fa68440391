"""What a job of a thousand processes costs outside of its arithmetic: its store, its alarm, its checkpoint, its data.

    python analysis/benchmarks/thousand.py --ranks 1024 --shards 10000 --folder DISK

The processes are threads of this one, over one real store; the code is the product's. Files have real headers and holes
instead of numbers. Nothing here trains, and no figure is of a GPU or of a network.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from qatscale.config.recipe import load_run_config
from qatscale.data.indexed import Shard
from qatscale.data.indexed_writer import encode_index
from qatscale.data.manifest import Manifest as DataManifest
from qatscale.data.manifest import SplitCounts, TokenizerCard
from qatscale.data.reader import BatchReader, TokenStream
from qatscale.engine.agreement import Agreement
from qatscale.engine.checkpoints import files
from qatscale.engine.checkpoints.manifest import FileRecord, Manifest, ParameterRecord
from qatscale.engine.checkpoints.reader import CheckpointReader, slice_table
from qatscale.engine.runtime import Runtime, free_port
from qatscale.model.llama import parameter_shapes
from qatscale.supervise import heartbeat, watchdog
from qatscale.supervise.failure_report import Failure
from qatscale.supervise.heartbeat import HeartbeatStore
from qatscale.supervise.watchdog import Watchdog

HOST = 8
"""Processes of a host."""


# --- a job of threads over one store ---


class Counted:
    """A store that counts what passes, over all connections."""

    def __init__(self, store: dist.Store, seen: Counter[str]) -> None:
        self._store, self._seen = store, seen

    def _count(self, kind: str, size: int) -> None:
        self._seen[f"{kind} calls"] += 1
        self._seen["bytes"] += size

    def set(self, key: str, value: Any) -> None:
        self._count("set", len(value))
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        self._count("get", len(value))
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values = self._store.multi_get(keys)
        self._count("get", sum(map(len, values)))
        return values

    def __getattr__(self, name: str) -> Any:
        if name in ("add", "wait", "delete_key"):
            self._count(name, 8)
        return getattr(self._store, name)


class Job:
    """The ranks of a job, each a thread, and what passes its store."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.port = ranks, free_port()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port))
        self.store = dist.TCPStore("127.0.0.1", self.port, is_master=True, wait_for_workers=False)
        self.seen: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(ranks)

    def runtime(self, rank: int) -> Runtime:
        return Runtime(rank, self.ranks, torch.device("cpu"))

    def each(self, act: Callable[..., Any], *of: list[Any]) -> list[Any]:
        """What all ranks give, called with their number and an element of each list."""
        return list(self._pool.map(act, range(self.ranks), *of))

    def timed(self, act: Callable[..., Any], *of: list[Any]) -> dict[str, Any]:
        """Seconds until all are done, and what passed the store meanwhile."""
        self.seen.clear()
        began, cpu = time.perf_counter(), time.process_time()
        self.each(act, *of)
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        return spent | {"megabytes": self.seen["bytes"] / 1e6, "calls": sum(self.seen.values()) - self.seen["bytes"]}

    def agreements(self) -> list[Agreement]:
        """An agreement for each rank. Each is the first of its process, as in a real job."""
        made = self.each(lambda rank: type("Agreement", (Agreement,), {})(self.runtime(rank)))
        for agreement in made:
            agreement._store = Counted(agreement._store, self.seen)
        return made


def agree(job: Job) -> dict[str, Any]:
    """A vote of every step, and a checkpoint's three rounds, in which rank 0 gets what is in a manifest."""
    agreements = job.agreements()
    shares = {f"blocks.{block}.attention.q.weight": ParameterRecord([4096, 4096], 5) for block in range(291)}

    def save(rank: int, agreement: Agreement) -> None:
        agreement.gather(None)
        agreement.gather(lambda: {"file": {"bytes": 1, "sha256": "0" * 64}, "parameters": shares if rank == 0 else {}})
        agreement.gather(None)

    def step(_rank: int, agreement: Agreement) -> None:
        agreement.voted()
        agreement.vote(0)

    job.timed(step, agreements)
    return {"a vote": job.timed(step, agreements), "a checkpoint": job.timed(save, agreements)}


# --- the alarm ---


def watchdogs(job: Job, logs: Path) -> tuple[list[Watchdog], dict[str, Any]]:
    """The watchdog of each rank after it has met the others, and what that cost."""
    made: list[Watchdog] = []
    for rank in range(job.ranks):
        of_rank = Watchdog(job.runtime(rank), logs, 600.0)
        of_rank._process = {**of_rank._process, "host": f"host-{rank // HOST}"}
        made.append(of_rank)
    plain = heartbeat.job_store
    heartbeat.job_store = lambda name, timeout: Counted(plain(name, timeout), job.seen)  # type: ignore[assignment, return-value]

    def meet(rank: int, of_rank: Watchdog) -> None:
        store = type("Store", (HeartbeatStore,), {})(rank, job.ranks, of_rank._heartbeat(), watchdog.PERIOD)
        of_rank._store = store
        of_rank._meet(store)

    try:
        return made, job.timed(meet, made)
    finally:
        heartbeat.job_store = plain


def alarm(job: Job, logs: Path, failing: int) -> tuple[dict[str, Any], list[Failure]]:
    """One rank meets an error, and all others a broken connection: until every rank knows the first failure."""
    dogs, met = watchdogs(job, logs)
    opened = Counter[str]()
    plain = Watchdog._file

    def counted(dog: Watchdog, rank: int) -> Path:
        opened["files"] += rank != dog.runtime.rank
        return plain(dog, rank)

    def fail(rank: int, dog: Watchdog) -> None:
        error = ValueError("a bad batch") if rank == failing else RuntimeError("Connection closed by peer")
        found[rank] = dog.resolve_failure(error)

    found: dict[int, Failure] = {}
    Watchdog._file = counted  # type: ignore[assignment, method-assign]
    try:
        spent = job.timed(fail, dogs) | {"files read": opened["files"]}
    finally:
        Watchdog._file = plain  # type: ignore[method-assign]
        for dog in dogs:
            assert dog._store is not None
            dog._store.close()
    return {"the start": met, "an alarm": spent}, [found[rank] for rank in range(job.ranks)]


# --- the checkpoint ---


def write_checkpoint(folder: Path, ranks: int, recipe: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a recipe as ZeRO-3 divides it: real headers, holes instead of numbers, a real table."""
    shapes = parameter_shapes(load_run_config(recipe).model)
    writing = files.writing_folder(folder, 1)
    writing.mkdir(parents=True)
    for rank in range(ranks):
        header, end = {}, 0
        for kind in files.KINDS:
            for name, shape in shapes.items():
                share = -(-int(np.prod(shape)) // ranks)
                size = min(share, int(np.prod(shape)) - share * rank)
                if size > 0:
                    key = files.slice_name(kind, name, share * rank, None)
                    header[key] = {"dtype": "F32", "shape": [size], "data_offsets": [end, end := end + 4 * size]}
        text = json.dumps(header).encode()
        with (writing / f"shard-{rank:05d}-of-{ranks:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    names = sorted(path.name for path in writing.iterdir())
    records = {n: FileRecord(bytes=(writing / n).stat().st_size, sha256="0" * 64) for n in names}
    manifest = Manifest(
        step=1, tokens=1, reason="end", kept=True, recipe_hash="", data="", plugin={"switched_at": None}, layout={},
        parameters={name: ParameterRecord(list(shape), 1) for name, shape in shapes.items()}, files=records,
    )  # fmt: skip
    began, cpu = time.perf_counter(), time.process_time()
    saved = files.commit(folder, manifest)
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return saved, spent | {"table_megabytes": (saved / "slices.npz").stat().st_size / 1e6}


def open_checkpoint(saved: Path, ranks: int, rank: int, *, table: bool = True) -> dict[str, Any]:
    """What a process does at a resume: open, and read its share of a parameter. table: else by the shards' headers."""

    def act() -> None:
        if not table:
            slice_table(saved, replace(files.read_manifest(saved), slices=None))
            return
        reader = CheckpointReader(saved)
        name, record = next(iter(reader.manifest.parameters.items()))
        share = -(-int(np.prod(record.shape)) // ranks)
        assert len(reader.read("weight", name, share * rank, share)) == share

    began, cpu = time.perf_counter(), time.process_time()
    act()
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    tracemalloc.start()  # again: it slows what it watches
    act()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return spent | {"peak_megabytes": peak / 1e6}


# --- the data ---


def write_data(folder: Path, shards: int, tokens: int = 1 << 20) -> Path:
    """A data set of so many sparse shards of one document each."""
    folder.mkdir()
    index = encode_index(np.array([tokens]), np.dtype("<u2"))
    for number in range(shards):
        (folder / f"train-{number:05d}.idx").write_bytes(index)
        with (folder / f"train-{number:05d}.bin").open("wb") as file:
            file.truncate(2 * tokens)
    made = [
        Shard(name=f"train-{number:05d}", documents=1, tokens=tokens, bin_bytes=2 * tokens, idx_bytes=len(index),
              bin_sha256="0" * 64, idx_sha256="0" * 64)
        for number in range(shards)
    ]  # fmt: skip
    counts = SplitCounts(documents=shards, tokens=shards * tokens, text_bytes=None, shards=made)
    card = TokenizerCard(kind="unknown", fingerprint=None, vocab_size=1 << 16, eos_id=None, folder=None)
    DataManifest(qatscale="0", dtype="uint16", tokenizer=card, sources=[], identity={}, empty_documents=0,
                 splits={"train": counts}).save(folder)  # fmt: skip
    return folder


def open_data(folder: Path) -> dict[str, Any]:
    """The first process of a host checks the files, another one trusts it; both read batches of 16 sequences."""
    found = {}
    for name, verify in (("the first of a host", "size"), ("another process", "trust")):
        began = time.perf_counter()
        stream = TokenStream.open(folder, "train", verify)  # type: ignore[arg-type]
        opening = time.perf_counter() - began
        reader = BatchReader({"": stream}, 4096, 1024, seed=0)
        for step in range(20):
            reader.batch(step, step, 64)
        reading = time.perf_counter() - began - opening
        found[name] = {"open_seconds": opening, "batch_seconds": reading / 20, "descriptors": _descriptors(folder)}
    return found


def _descriptors(folder: Path) -> int:
    """Open files of this process inside a folder."""
    return sum(file.path.startswith(str(folder)) for file in psutil.Process().open_files())


def measure(ranks: int, shards: int, recipe: str, folder: Path) -> Iterator[dict[str, Any]]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    threading.stack_size(1 << 20)
    sys.setswitchinterval(0.2)
    slower = max(1.0, ranks / 64)  # the threads of one interpreter take turns: so many look that much more rarely
    watchdog.POLL, heartbeat.ALARMED, watchdog.GATHER = 0.1 * slower, 0.2 * slower, 300.0
    saved, table = write_checkpoint(folder / "checkpoints", ranks, recipe)
    yield {"the table": table}
    yield {"open by the table": open_checkpoint(saved, ranks, ranks // 2)}
    yield {"open by headers": open_checkpoint(saved, ranks, ranks // 2, table=False)}
    yield {"data": open_data(write_data(folder / "data", shards))}
    yield agree(Job(ranks))
    costs, failures = alarm(Job(ranks), folder / "logs", failing=ranks * 2 // 3)
    assert {(failure.rank, failure.error) for failure in failures} == {(ranks * 2 // 3, "ValueError: a bad batch")}
    yield costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--recipe", default="8b")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for found in measure(given.ranks, given.shards, given.recipe, Path(folder)):
            for what, costs in found.items():
                print(what, json.dumps(costs), flush=True)
    os._exit(0)  # threads of the stores need not be waited for


if __name__ == "__main__":
    main()
