"""A worker claims one run of a study after the other and trains it in its own process.

Imports and the process group are set up once. A run of several processes is started through the DeepSpeed launcher. A
run that fails is marked with the reason, and the worker continues with others.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from qatscale.engine.checkpoints.files import list_checkpoints, remove, step_of
from qatscale.engine.runtime import free_port
from qatscale.errors import EXIT_OK, errno_of, exit_code
from qatscale.study.folder import StudyFolder, StudyJob
from qatscale.study.lay_out import record
from qatscale.study.state import StudyState
from qatscale.supervise.claims import Claim, end_taken_over, worker_name
from qatscale.supervise.signals import catch

POLL = 1.0
"""Seconds between two searches for a run that can start; grows tenfold while nothing changes."""
REASON_LENGTH = 500
"""Characters of an error that a claim keeps; the log has all."""


class Worker:
    """Trains runs of a study until none is left to train."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self.name = worker_name(os.getpid())
        self._stopped = 0
        """The number of the signal."""

    def work(self) -> int:
        """The exit code: 0 when no run is left to train, 75 or 130 after a signal, 75 on a full disk."""
        catch(self._on_signal)
        state, pause = StudyState(self.folder), POLL
        while not self._stopped:
            state.refresh()
            job = state.next_job()
            if job is None:
                if not state.may_go_on:
                    return EXIT_OK
                end = time.monotonic() + pause
                while not self._stopped and time.monotonic() < end:
                    time.sleep(POLL / 10)
                pause = min(pause * 1.2, 10 * POLL)
                continue
            pause = POLL
            claim = self.folder.claims.take(job.name, state.states[job.name].attempt, self.name)
            if claim is not None and not self._train(job, claim):
                return exit_code(self._stopped)
        return exit_code(self._stopped)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the handler's signature
        self._stopped = number

    def _train(self, job: StudyJob, claim: Claim) -> bool:
        """Train a claimed run and close the claim. False where a signal or a full disk stopped it."""
        claim.beat_until_closed(lambda: end_taken_over(job.name))
        begun = self.folder.run(job.name).run_file.exists()
        branch_from = None if begun or job.parent is None else f"{self.folder.runs / job.parent}@{job.start}"
        try:
            done = self._launch(job, branch_from) if job.processes > 1 else self._train_here(job, branch_from)
        except KeyboardInterrupt:
            claim.close("released", "interrupted")
            raise
        except Exception as error:  # whatever ends one run must not end the others
            logging.getLogger("qatscale").exception(job.name)
            reason = (f"{error}".strip() or type(error).__name__)[:REASON_LENGTH]
            print(f"{job.name} failed: {reason}", flush=True)
            full = errno_of(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # every run would fail
            claim.close("released" if full else "failed", reason)
            if not _device_works():
                print("the device does not respond any more; this worker restarts", flush=True)
                os.execv(sys.executable, [sys.executable, "-m", "qatscale", "study", "work", str(self.folder.path)])
            return not (self._stopped or full)
        if not done:
            claim.close("released", "stopped by a signal")
            return False
        record(self.folder, job.name)
        claim.close("done")
        clear_checkpoints(self.folder, job.name)
        return True

    def _train_here(self, job: StudyJob, branch_from: str | None) -> bool:
        from qatscale.train.run import train

        if self._stopped:  # during the import, which takes seconds
            return False
        outcome = train(self.folder.config(job.name), branch_from, linger=False)
        self._stopped = self._stopped or outcome.signal  # the run's own handlers took it
        return outcome.status == "done"

    def _launch(self, job: StudyJob, branch_from: str | None) -> bool:
        """Train through DeepSpeed's launcher in a process group of its own; a signal is passed on to it."""
        deepspeed = Path(sys.executable).with_name("deepspeed")
        command = [str(deepspeed), "--num_gpus", str(job.processes), "--master_port", str(free_port())]
        command += ["--module", "qatscale", "train", str(self.folder.recipe(job.name)), f"output={self.folder.runs}"]
        command += ["--branch-from", branch_from] if branch_from else []
        child = subprocess.Popen(command, start_new_session=True)
        while child.poll() is None:
            if self._stopped:
                os.killpg(child.pid, signal.SIGTERM)
                os.killpg(child.pid, signal.SIGCONT)
                child.wait()
            time.sleep(0.1)
        run = self.folder.run(job.name)
        if run.is_done:
            return True
        if run.run_file.exists() and run.status == "stopped":
            return False
        raise RuntimeError(run.failure or f"the launcher ended with code {child.returncode}")


def _device_works() -> bool:
    """Whether the GPU still computes. After a failed kernel it does not, until the process ends."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        return int(torch.ones(1, device="cuda").sum()) == 1
    except RuntimeError:
        return False


def clear_checkpoints(folder: StudyFolder, name: str) -> None:
    """Remove the checkpoints that nobody needs once the run `name` is done: its own from which no run branches, and its
    parent's where it was the last one to branch. The final checkpoint of a run stays, and so do those of `keep_at`."""
    jobs = folder.jobs
    needed = {(job.parent, job.start) for job in jobs.values() if not folder.run(job.name).is_done}
    needed |= {(job.name, step) for job in jobs.values() for step in job.stay}
    job = jobs[name]
    useless = [path for path in list_checkpoints(folder.run(name).checkpoints) if step_of(path) != job.steps]
    if job.parent is not None:
        path = folder.checkpoint(job.parent, job.start)
        newest = list_checkpoints(path.parent)[-1:]
        if job.parent in jobs and job.start != jobs[job.parent].steps and path not in newest:
            useless.append(path)
    for path in useless:
        if (path.parent.parent.name, step_of(path)) not in needed:
            with suppress(OSError):  # another worker was faster
                remove(path)
