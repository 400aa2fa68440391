"""Training processes that are watched from outside and killed with SIGKILL at a moment drawn before.

They are forked from a process that has imported torch and DeepSpeed: a launch costs 2 seconds instead of 10, and is
`qatscale.train.run.train` from its first line on, process group included. Counters in shared memory tell where each
process is; nothing else of them is changed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

Moment = Literal["starting", "training", "saving", "file operation"]

WINDOW = 1.0
"""Seconds after the first step in which a kill of moment `training` falls."""
GRACE = 30.0
"""Seconds that those who were not killed have to end by themselves. A launcher would end them sooner."""
FILE_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree"})
"""Audit events before which a save can be cut. Writing into an open file raises none; `saving` cuts into that."""

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Point:
    """When to kill whom."""

    moment: Moment
    """starting: from the fork to the first step. training: within WINDOW of the first step. saving: within the time
    that a save takes. file operation: before one of a save's file operations."""
    victim: int
    """A rank; the one that counts file operations."""
    everyone: bool
    """Whether the others are killed with it."""
    share: float
    """Of the start-up time, of WINDOW, of a save's time or of its file operations: in [0, 1)."""
    save: int
    """Which save of the launch, from 1; a later one where that has fewer file operations. Of the last two moments."""

    def __str__(self) -> str:
        where = f" {self.save}" if self.moment in ("saving", "file operation") else ""
        return f"{self.moment}{where} at {self.share:.2f}, {'all' if self.everyone else f'rank {self.victim}'}"


@dataclass(frozen=True)
class Measures:
    """What an uninterrupted launch took, on which the moments of kills are laid."""

    starting: float
    """Seconds from the fork to the first step."""
    saving: float
    """Seconds of the longest save."""
    operations: tuple[int, ...]
    """Of a rank in a save, at most."""


@dataclass(frozen=True)
class Ended:
    """How a launch ended."""

    killed: bool
    """False: it was over before its moment came, or had none."""
    inside: bool
    """Whether a victim was between the begin and the end of a save, rotation included."""
    steps: int
    """Optimizer steps done: the last that a process began, or saved."""
    codes: tuple[int, ...]
    hung: bool
    """Somebody who was not killed had not ended after GRACE seconds."""
    output: str
    measures: Measures


class Shared:
    """What the processes of a launch tell: one number a rank each."""

    def __init__(self, ranks: int) -> None:
        self.step, self.begun, self.ended, self.operations, self.most = (FORK.RawArray("l", ranks) for _ in range(5))
        self.starting, self.saving = FORK.RawArray("d", ranks), FORK.RawArray("d", ranks)
        self.step[:] = [-1] * ranks

    def in_a_save(self, rank: int) -> bool:
        return self.begun[rank] > self.ended[rank]


def preload() -> None:
    """Import what a training process needs, so that forks have it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - which every engine imports, with a compiler
    import matplotlib.backends.backend_agg  # noqa: F401

    import qatscale.tracking.curves
    import qatscale.train.run  # noqa: F401


def launch(
    overrides: Sequence[str], ranks: int, log: Path, point: Point | None = None, measures: Measures | None = None
) -> Ended:
    """Train the debug run of `overrides` on so many processes until it ends or `point` comes. `log`: a new folder."""
    assert point is None or measures is not None
    shared = Shared(ranks)
    trap = (0, 0, 0)
    if point and measures and point.moment == "file operation":
        trap = (point.victim, point.save, 1 + int(point.share * measures.operations[point.victim]))
    log.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [log / f"rank-{rank}.txt" for rank in range(ranks)]
    processes = [
        FORK.Process(target=_train, args=(rank, ranks, port, list(overrides), logs[rank], shared, trap))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    killed, inside, steps = False, False, 0
    if point and measures and _reached(point, measures, processes, shared):
        victims = range(ranks) if point.everyone else [point.victim]
        for rank in victims:
            processes[rank].kill()
        inside = any(shared.in_a_save(rank) for rank in victims)
        killed, steps = True, max(shared.step)
    hung = _end(processes, GRACE if killed else 300)
    return Ended(
        killed,
        inside,
        steps if killed else max(shared.step),
        tuple(process.exitcode or 0 for process in processes),
        hung,
        "\n".join(path.read_text(errors="replace") for path in logs if path.exists()),
        Measures(max(shared.starting), max(shared.saving), tuple(shared.most)),
    )


def _reached(point: Point, measures: Measures, processes: Sequence[BaseProcess], shared: Shared) -> bool:
    """Wait for the moment; False where a process ended before."""
    if point.moment == "file operation":  # the victim kills itself
        process = processes[point.victim]
        return _until(lambda: process.exitcode is not None, processes) and process.exitcode == -signal.SIGKILL
    if point.moment == "starting":
        return _after(point.share * measures.starting, processes)
    if point.moment == "training":
        return _until(lambda: shared.step[0] >= 0, processes) and _after(point.share * WINDOW, processes)
    begun = _until(lambda: shared.begun[point.victim] >= point.save, processes)
    return begun and _after(point.share * measures.saving, processes)


def _after(seconds: float, processes: Sequence[BaseProcess]) -> bool:
    end = time.perf_counter() + seconds
    return _until(lambda: time.perf_counter() >= end, processes)


def _until(due: Callable[[], bool], processes: Sequence[BaseProcess]) -> bool:
    while not due():
        if any(process.exitcode is not None for process in processes):
            return due()
        time.sleep(1e-4)
    return True


def _end(processes: Sequence[BaseProcess], seconds: float) -> bool:
    """Wait for all to end, and kill whoever has not in time. When one fails the others have GRACE. True: had to."""
    end = time.monotonic() + seconds
    failed = False
    while any(process.exitcode is None for process in processes) and time.monotonic() < end:
        if not failed and any(process.exitcode not in (None, 0) for process in processes):
            failed, end = True, min(end, time.monotonic() + GRACE)
        time.sleep(0.005)
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
    for process in processes:
        process.join()
    return bool(late)


# --- in the training process ---


def _train(
    rank: int, ranks: int, port: int, overrides: list[str], log: Path, shared: Shared, trap: tuple[int, int, int]
) -> None:
    """The whole life of a forked process. Exit code 0: the run is done."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    _watch(rank, shared, trap)
    from qatscale.config.recipe import load_run_config
    from qatscale.train.run import train

    assert train(load_run_config("debug", overrides)).status == "done"


def _watch(rank: int, shared: Shared, trap: tuple[int, int, int]) -> None:
    """Keep the counters of this process. trap: (rank, save, file operation of it) to die at; save 0: none."""
    from qatscale.data.reader import BatchReader
    from qatscale.train.checkpointing import AsyncCheckpointer

    forked = time.perf_counter()
    batch, save, write = BatchReader.batch, AsyncCheckpointer.save, AsyncCheckpointer._write
    writer = 0

    def watched_batch(self: Any, step: int, *rest: int) -> Any:
        if shared.step[rank] < 0:
            shared.starting[rank] = time.perf_counter() - forked
        shared.step[rank] = step
        return batch(self, step, *rest)

    def watched_save(self: Any, step: int, reason: str) -> None:
        shared.step[rank] = step
        save(self, step, reason)

    def watched_write(*arguments: Any) -> Path:
        """In the thread that writes; rotation included."""
        nonlocal writer
        writer, shared.operations[rank] = threading.get_ident(), 0
        shared.begun[rank] += 1
        began = time.perf_counter()
        path = write(*arguments)
        shared.saving[rank] = max(shared.saving[rank], time.perf_counter() - began)
        shared.ended[rank] += 1
        shared.most[rank] = max(shared.most[rank], shared.operations[rank])
        return path

    def audit(event: str, _: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and shared.in_a_save(rank) and threading.get_ident() == writer:
            shared.operations[rank] += 1
            # not every save has as many operations as the longest: then a later one is cut
            if rank == trap[0] and shared.begun[rank] >= trap[1] > 0 and shared.operations[rank] == trap[2]:
                os.kill(os.getpid(), signal.SIGKILL)

    BatchReader.batch = watched_batch  # type: ignore[method-assign]
    AsyncCheckpointer.save, AsyncCheckpointer._write = watched_save, watched_write  # type: ignore[method-assign]
    sys.addaudithook(audit)
