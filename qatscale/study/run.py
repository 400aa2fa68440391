"""Workers of a study on this machine: started, watched, and replaced when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qatscale.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_REQUEUE, FailedError, UserError
from qatscale.study.folder import StudyFolder
from qatscale.supervise.claims import worker_name

SHORT_LIFE = 30.0
"""Seconds; a worker that ends sooner and has claimed no run would fail again."""
MAX_SHORT_LIVES = 3


def default_workers(folder: StudyFolder, per_gpu: int | None) -> int:
    """One worker or `per_gpu` on each GPU, fewer where a run takes several GPUs. Without GPUs one on each core."""
    gpus, widest = _gpus_and_widest(folder)
    return max(1, gpus // widest) * (per_gpu or 1) if gpus else max(1, (os.cpu_count() or 1) // widest)


def _gpus_and_widest(folder: StudyFolder) -> tuple[int, int]:
    """GPUs of this machine, and processes of the study's widest run."""
    import torch

    return torch.cuda.device_count(), max(job.processes for job in folder.jobs.values())


@dataclass
class _Slot:
    """A worker's devices, and the process that uses them now."""

    number: int
    gpus: list[int]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    short_lives: int = 0
    finished: bool = False


class LocalWorkers:
    """A context manager that runs `count` workers on this machine. On exit it stops them, after they have saved."""

    def __init__(self, folder: StudyFolder, count: int, per_gpu: int | None = None) -> None:
        self.folder = folder
        self._slots = [_Slot(i, gpus) for i, gpus in enumerate(_devices(folder, count, per_gpu))]

    def __enter__(self) -> LocalWorkers:
        self.folder.logs.mkdir(parents=True, exist_ok=True)
        for slot in self._slots:
            self._start(slot)
        return self

    def restart_dead(self) -> bool:
        """Restart workers that died. False once all have ended; UserError or FailedError where one cannot start."""
        for slot in self._slots:
            if slot.finished or slot.process is None or (code := slot.process.poll()) is None:
                continue
            if code in (EXIT_OK, EXIT_REQUEUE):
                slot.finished = True
                continue
            short = time.monotonic() - slot.started < SHORT_LIFE
            idle = short and not self.folder.claims.has_claimed(worker_name(slot.process.pid))
            slot.short_lives = slot.short_lives + 1 if idle else 0
            if code == EXIT_BAD_INPUT or slot.short_lives >= MAX_SHORT_LIVES:
                problem = f"worker {slot.number} ended with code {code}."
                error = UserError("study", str(self.folder.path), problem, f"Its log is {self._log(slot)}.")
                raise error if code == EXIT_BAD_INPUT else FailedError(error)
            self._start(slot)
        return not all(slot.finished for slot in self._slots)

    def __exit__(self, *_: object) -> None:
        running = [slot.process for slot in self._slots if slot.process is not None and slot.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)  # a stopped one would never hear of it
        for process in running:
            process.wait()

    def _log(self, slot: _Slot) -> Path:
        return self.folder.logs / f"worker-{slot.number}.log"

    def _start(self, slot: _Slot) -> None:
        environ = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, slot.gpus))} if slot.gpus else {})
        environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores
        with self._log(slot).open("ab") as log:
            slot.process = subprocess.Popen(
                [sys.executable, "-m", "qatscale", "study", "work", str(self.folder.path)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops them
            )  # fmt: skip
        slot.started = time.monotonic()


def _devices(folder: StudyFolder, count: int, per_gpu: int | None) -> list[list[int]]:
    """The GPUs of each worker; empty lists without any."""
    gpus, widest = _gpus_and_widest(folder)
    if not gpus:
        return [[] for _ in range(count)]
    groups = [i // (per_gpu or 1) % max(1, gpus // widest) for i in range(count)]
    return [[group * widest + j for j in range(widest)] for group in groups]
