"""The MLflow upload: a process of its own tails the run folder, and training only writes files.

A failing or hanging server can thus neither stop nor slow a run. When a trainer is killed, its follower uploads the
last records and marks the run KILLED. Whatever is still missing, `qatscale track-sync RUN` uploads with the same code.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import cast

from qatscale.files import HeldError, locked
from qatscale.supervise import process
from qatscale.supervise.claims import Identity
from qatscale.tracking.mlflow_sync import HAND_OVER, Uploader, lock_file
from qatscale.tracking.refusals import as_refused, shown, stall_limit
from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.store import Cursor, database, known_store, quiet_mlflow, resolve_uri

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
IMPORT = 60.0
"""Seconds that a follower may take to load MLflow."""
ANSWER = 5.0
"""Seconds that a run waits for MLflow's first answer before its first step."""
STUCK = 10.0
"""Seconds without progress after which a run that has ended no longer waits for its upload."""
MEMORY = 2 << 30
"""Bytes that a follower may allocate: an answer without end must not fill the machine."""
SAMPLING = 10.0
"""Seconds between samples of the system metrics, MLflow's own default."""


class Follower:
    """The trainer's handle of its follower process; None where tracking is off."""

    def __init__(self, folder: RunFolder, child: subprocess.Popen[bytes] | None) -> None:
        self.folder, self.child = folder, child

    def first_answer(self) -> str | None:
        """Wait until MLflow has answered, for ANSWER seconds. Returns a line for the user where it failed."""
        begun = time.monotonic()
        while self.child is not None and self.child.poll() is None and time.monotonic() < begun + IMPORT:
            cursor = self._cursor()
            if cursor and (cursor.answered or _is_overdue(cursor)):
                if refusal := self.refusal():
                    return refusal
                reason = (cursor.error or f"{cursor.uri} has not answered for {ANSWER:.0f} s").removesuffix(".")
                keeps = "The run's folder records everything, and uploads are tried again."
                return None if cursor.answered and cursor.error is None else f"note: {reason}. {keeps}"
            time.sleep(0.05)
        return None

    def refusal(self) -> str | None:
        """A line for the user where MLflow has refused the run for good. It does not wait."""
        cursor = None if self.child is None else self._cursor()
        if cursor is None or not cursor.refused:
            return None
        return f"warning: MLflow does not take this run, which trains without it. {cursor.error}"

    def finish(self, seconds: float = 30.0) -> str | None:
        """Wait at most `seconds` for the upload to end, and only while MLflow takes it.

        Returns a line for the user if something remains to do.
        """
        if self.child is None:
            return None
        moved, seen = time.monotonic(), None
        end = moved + seconds
        while self.child.poll() is None and time.monotonic() < min(end, moved + STUCK):
            cursor = self._cursor()
            if cursor and (cursor.error or _is_overdue(cursor)):
                break
            if cursor is None or cursor != seen:
                moved, seen = time.monotonic(), cursor
            time.sleep(0.05)
        if self.child.poll() == 0:
            return None
        cursor = self._cursor()
        log = lock_file(self.folder)
        seen_there = f" (see {log})" if log.stat().st_size else ""
        reason = (cursor and cursor.error) or f"it has not answered in time{seen_there}"
        ends = self.child.poll() is not None or (cursor is not None and cursor.refused)
        more = "" if ends else " The upload continues in the background; should it end early,"
        return (
            f"MLflow does not have all of this run: {reason.removesuffix('.')}.{more} "
            f"`qatscale track-sync {self.folder.path}` uploads the rest."
        )

    def _cursor(self) -> Cursor | None:
        """The child's cursor; None before it asked MLflow, while a predecessor may still write."""
        assert self.child is not None
        cursor = Cursor.load(self.folder)
        return cursor if cursor and cursor.follower and cursor.follower["pid"] == self.child.pid else None


def _is_overdue(cursor: Cursor) -> bool:
    """Whether a server takes longer for its first answer than it should, as one that never answers."""
    waits = not cursor.answered and cursor.asked is not None and database(cursor.uri) is None
    return waits and time.monotonic() > (cursor.asked or 0.0) + ANSWER


def start_follower(folder: RunFolder, uri: str | None, patience: float = PATIENCE) -> Follower:
    """Start the upload of a run and return at once. `uri`: tracking.uri of the recipe, see `resolve_uri`.

    Call it on rank 0 after the `start` or `resume` event, which names the process that the follower watches.
    """
    resolved = resolve_uri(uri, known=known_store(folder))
    if resolved is None:
        return Follower(folder, None)
    afresh = {"follower": None, "asked": None, "answered": False, "error": None, "refused": False}
    # `track-sync` needs the store even if it never answers
    Cursor.of_store(folder, resolved).model_copy(update=afresh).save(folder)
    folder.logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "qatscale.tracking.follower", str(folder.path.resolve())]
    command += ["--patience", str(patience)]
    with lock_file(folder).open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C and a launcher's kill of the process group do not reach the follower
            # the store's address may hold a password, which the list of processes would show
            env=os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": resolved},
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
    """Follows a run from its start to the last confirmed upload, or until it gives up."""

    def __init__(self, folder: RunFolder, uri: str, patience: float) -> None:
        self.folder, self.uri, self.patience = folder, uri, patience
        self.writer = folder.writer
        self._identity = cast(Identity, process.identity())
        self._asked = time.monotonic()
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
                complete = self.upload()
                self._note(None)
                if complete:
                    return True
                pause = POLL
            except Exception as error:  # a failing store must not end the follower
                self._note(error)
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

    def _note(self, error: Exception | None) -> None:
        """Record how an attempt went, for the run and for `track-sync`. A refusal ends the patience after a run."""
        cursor = self._uploader.cursor if self._uploader else Cursor.of_store(self.folder, self.uri)
        cursor.follower, cursor.asked = self._identity, self._asked
        connected = self._uploader is not None and self._uploader.is_connected
        refused = as_refused(error) if error and not connected else None
        text = str(refused) if refused else shown(error) if error else None
        if refused:
            self.patience = 0.0
        if (cursor.answered, cursor.error, cursor.refused) != (True, text, refused is not None):
            cursor.answered, cursor.error, cursor.refused = True, text, refused is not None
            cursor.save(self.folder)

    def introduce(self) -> None:
        """Record that this process asks the store from now on."""
        self._asked = time.monotonic()
        cursor = Cursor.of_store(self.folder, self.uri)
        cursor.follower, cursor.asked = self._identity, self._asked
        cursor.save(self.folder)

    def upload(self) -> bool:
        """One attempt. The uploader is created when the store first answers, and again after a failure."""
        with stall_limit() as progress:
            if self._uploader is None:
                self._uploader = Uploader(self.folder, self.uri, progress)
            complete = self._uploader.sync()
            if not complete:
                self._system = self._system or SystemMetrics(self._uploader)
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
    parser.add_argument("--patience", type=float, default=PATIENCE)
    arguments = parser.parse_args()

    def hand_over(*_: object) -> None:
        raise HandOver

    os.nice(10)  # training has priority
    folder, uri = RunFolder.open(arguments.folder), os.environ["MLFLOW_TRACKING_URI"]
    following = Following(folder, uri, arguments.patience)
    signal.signal(signal.SIGTERM, lambda *_: following.give_up_in(TERM_GRACE))
    signal.signal(HAND_OVER, hand_over)
    try:
        # A follower that a killed trainer left behind may still be uploading. It ends once it sees that another process
        # continues the run. If it hangs, the lock is never forced.
        with quiet_mlflow(), locked(lock_file(folder), HANDOVER, give_up=following.is_superseded):
            import mlflow.tracking  # noqa: F401 - it takes seconds, which are not the store's

            _limit_memory()
            following.introduce()
            return 0 if following.run() else 1
    except HeldError as error:
        log(f"not started: {error}")
    except HandOver:
        log("`qatscale track-sync` uploads the rest")
    return 1


class HandOver(BaseException):
    """Signal handler: end at once, for `track-sync`. An upload may end anywhere."""


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    sys.exit(main())
