"""MLflow upload in a process of its own, which tails the run folder. Training only ever writes files.

So a failing or hanging server can neither stop nor slow a run. When a trainer is killed, its follower uploads the last
records and marks the run KILLED. Whatever is still missing, `qatscale track-sync RUN` uploads with the same code.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from qatscale.files import HeldError, locked
from qatscale.tracking.mlflow_sync import Uploader, lock_file, shown
from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.store import Cursor, quiet_mlflow, resolve_uri

POLL = 2.0
"""Seconds between two looks at the run folder."""
LONGEST_PAUSE = 60.0
"""Upper end of the pauses between failed attempts, which double from POLL."""
HANDOVER = 180.0
"""Seconds that a follower waits for its predecessor."""
TERM_GRACE = 25.0
"""Seconds from SIGTERM to the follower's end; DeepSpeed's launcher and Slurm send SIGKILL after 30."""
PATIENCE = 120.0
"""Seconds after the run's end in which the follower keeps trying."""
SAMPLING = 10.0
"""Seconds between samples of the system metrics, MLflow's own default."""


class Follower:
    """The trainer's handle of its follower process; None where tracking is off."""

    def __init__(self, folder: RunFolder, child: subprocess.Popen[bytes] | None) -> None:
        self.folder, self.child = folder, child

    def finish(self, seconds: float = 30.0) -> str | None:
        """Wait at most `seconds` for the upload to end. Returns a line for the user if something remains to do."""
        if self.child is None:
            return None
        try:
            if self.child.wait(seconds) == 0:
                return None
            how = "failed"
        except subprocess.TimeoutExpired:
            how = f"is not finished after {seconds:.0f} s; it continues in the background"
        log = lock_file(self.folder)
        return f"The upload to MLflow {how} (see {log}). `qatscale track-sync {self.folder.path}` uploads the rest."


def start_follower(folder: RunFolder, uri: str | None, patience: float = PATIENCE) -> Follower:
    """Start the upload of a run and return at once. `uri`: tracking.uri of the recipe, see `resolve_uri`.

    Call it on rank 0 after the `start` or `resume` event, which names the process that the follower watches.
    """
    cursor = Cursor.load(folder)
    resolved = resolve_uri(uri, known=cursor.uri if cursor else None)
    if resolved is None:
        return Follower(folder, None)
    if cursor is None or cursor.uri != resolved:
        Cursor.fresh(folder, resolved).save(folder)  # `track-sync` needs the store even if it never answers
    folder.logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "qatscale.tracking.follower", str(folder.path.resolve())]
    command += ["--uri", resolved, "--patience", str(patience)]
    with lock_file(folder).open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C and a launcher's kill of the process group do not reach the follower
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return Follower(folder, child)


class SystemMetrics:
    """CPU, memory, disk, network and GPUs of this machine, as MLflow's own system metrics of a run.

    MLflow's monitors are sampled in the follower's loop, because MLflow's thread ends at its first failed request.
    """

    def __init__(self, uploader: Uploader) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._uploader = uploader
        self._interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", SAMPLING))
        self._monitor = SystemMetricsMonitor(uploader.cursor.run_id, tracking_uri=uploader.uri)
        self._sample()  # CPU and network are differences between two samples
        self._created = uploader.folder.run["created"]
        self._next = time.monotonic() + min(1.0, self._interval)

    def _sample(self) -> dict[str, float]:
        self._monitor.collect_metrics()
        sample: dict[str, float] = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return sample

    def upload(self) -> None:
        """Upload a sample if one is due. Its step counts intervals since the run was created, also after a resume."""
        from mlflow.entities import Metric

        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._interval
        now = time.time()
        step = int((now - self._created) / self._interval)
        values = self._sample().items()
        self._uploader.log([Metric(f"system/{key}", value, int(now * 1000), step) for key, value in values])


class Following:
    """The follower's life: from the start of a run to the last confirmed upload, or until it gives up."""

    def __init__(self, folder: RunFolder, uri: str, patience: float) -> None:
        self.folder, self.uri, self.patience = folder, uri, patience
        self.writer = folder.writer
        self._give_up_at = math.inf
        self._uploader: Uploader | None = None
        self._system: SystemMetrics | None = None

    def run(self) -> bool:
        """True: the run has ended and MLflow has all of it.

        False: gave up `patience` seconds after the run's end or after a SIGTERM, or another process continues the run
        and brought its own follower.
        """
        pause, ended = POLL, False
        while not self.is_superseded():
            if self.folder.has_ended and not ended:
                ended = True
                self.give_up_in(self.patience)
            try:
                if self.upload():
                    return True
                pause = POLL
            except Exception as error:  # a failing store must not end the follower
                log(f"attempt failed: {shown(error)}; next in {pause:.0f} s")
                self._uploader = self._system = None
                pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() >= self._give_up_at:
                log(f"gave up; `qatscale track-sync {self.folder.path}` uploads the rest")
                return False
            end = time.monotonic() + pause
            while time.monotonic() < min(end, self._give_up_at) and (ended or not self.folder.has_ended):
                time.sleep(0.2)
        log("another process continues this run and has its own follower")
        return False

    def upload(self) -> bool:
        """One attempt. The uploader is created when the store first answers, and again after a failure."""
        if self._uploader is None:
            self._uploader = Uploader(self.folder, self.uri)
        complete = self._uploader.sync()
        if not complete:
            if self._system is None:
                self._system = SystemMetrics(self._uploader)
            self._system.upload()
        return complete

    def is_superseded(self) -> bool:
        return self.folder.writer != self.writer

    def give_up_in(self, seconds: float) -> None:
        self._give_up_at = min(self._give_up_at, time.monotonic() + seconds)


def log(text: str) -> None:
    print(f"{datetime.now().isoformat(timespec='seconds')} {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qatscale.tracking.follower", description="Upload a run to MLflow.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    arguments = parser.parse_args()
    os.nice(10)  # training has priority
    following = Following(RunFolder.open(arguments.folder), arguments.uri, arguments.patience)
    signal.signal(signal.SIGTERM, lambda *_: following.give_up_in(TERM_GRACE))
    try:
        # A follower that a killed trainer left behind may still be uploading. It ends once it sees that another process
        # continues the run. If it hangs, the lock is never forced.
        with quiet_mlflow(), locked(lock_file(following.folder), HANDOVER, give_up=following.is_superseded):
            return 0 if following.run() else 1
    except HeldError as error:
        log(f"not started: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
