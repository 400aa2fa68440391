"""Workers of a study on this machine, started, watched and replaced when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from qatscale.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_REQUEUE
from qatscale.study.claims import worker_name
from qatscale.study.folder import StudyFolder

SHORT_LIFE = 30.0
"""Seconds; a worker that ends sooner and has claimed no run has a fault that starting it again does not cure."""
MOST_SHORT_LIVES = 3


class WorkerFailedError(RuntimeError):
    """The workers cannot start."""


def default_workers(folder: StudyFolder, per_gpu: int | None) -> int:
    """One a GPU, or `per_gpu`; fewer where runs take several GPUs each. Without GPUs one a core."""
    import torch

    gpus, widest = torch.cuda.device_count(), max(job.processes for job in folder.jobs.values())
    if gpus:
        return max(1, gpus // widest) * (per_gpu or 1)
    return max(1, (os.cpu_count() or 1) // widest)


@dataclass
class _Seat:
    """The place of one worker: its devices, and the process that has it now."""

    number: int
    gpus: list[int]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    short_lives: int = 0
    finished: bool = field(default=False)


class LocalWorkers:
    """A context around `count` workers of a study on this machine. Leaving it stops them, after they have saved."""

    def __init__(self, folder: StudyFolder, count: int, per_gpu: int | None = None) -> None:
        self.folder = folder
        self._seats = [_Seat(i, gpus) for i, gpus in enumerate(_devices(folder, count, per_gpu))]

    def __enter__(self) -> LocalWorkers:
        self.folder.logs.mkdir(parents=True, exist_ok=True)
        for seat in self._seats:
            self._start(seat)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> int:
        return sum(seat.process is not None and seat.process.poll() is None for seat in self._seats)

    def tend(self) -> bool:
        """Replace workers that died; False once all have ended by themselves. WorkerFailedError if none can live."""
        for seat in self._seats:
            if seat.finished or seat.process is None or (code := seat.process.poll()) is None:
                continue
            if code in (EXIT_OK, EXIT_REQUEUE):
                seat.finished = True
                continue
            short = time.monotonic() - seat.started < SHORT_LIFE
            idle = short and not self.folder.claims.has_claimed(worker_name(seat.process.pid))
            seat.short_lives = seat.short_lives + 1 if idle else 0
            if code == EXIT_BAD_INPUT or seat.short_lives >= MOST_SHORT_LIVES:
                raise WorkerFailedError(f"worker {seat.number} ended with code {code}; see {self._log(seat)}")
            self._start(seat)
        return not all(seat.finished for seat in self._seats)

    def stop(self) -> None:
        """Ask all to save and end, and wait for them."""
        running = [seat.process for seat in self._seats if seat.process is not None and seat.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()

    def _log(self, seat: _Seat) -> Path:
        return self.folder.logs / f"worker-{seat.number}.log"

    def _start(self, seat: _Seat) -> None:
        environ = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, seat.gpus))} if seat.gpus else {})
        environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores
        with self._log(seat).open("ab") as log:
            seat.process = subprocess.Popen(
                [sys.executable, "-m", "qatscale", "study", "work", str(self.folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,  # Ctrl-C is for this process, which then stops them in order
            )
        seat.started = time.monotonic()


def _devices(folder: StudyFolder, count: int, per_gpu: int | None) -> list[list[int]]:
    """The GPUs of each worker; empty lists without any."""
    import torch

    gpus, widest = torch.cuda.device_count(), max(job.processes for job in folder.jobs.values())
    if not gpus:
        return [[] for _ in range(count)]
    groups = max(1, gpus // widest)
    shared = per_gpu or 1
    return [[(i // shared % groups) * widest + j for j in range(widest)] for i in range(count)]
