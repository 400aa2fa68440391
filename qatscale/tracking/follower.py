"""MLflow upload in a process of its own: it tails the run folder, and training only ever writes files.

So a server that fails, hangs or is not there can neither stop nor slow a run, and a trainer that is killed leaves
somebody behind who uploads its last records and marks the run KILLED. Whatever is missing in the end,
`qatscale track-sync RUN` uploads: the same code, once.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

from qatscale.files import HeldError, locked
from qatscale.tracking.mlflow_sync import Uploader, lock_file, shown
from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.start_follower import PATIENCE
from qatscale.tracking.store import quiet_mlflow
from qatscale.tracking.system_metrics import SystemMetrics

POLL = 2.0
"""Seconds between two looks at the run folder."""
LONGEST_PAUSE = 60.0
"""Upper end of the pauses between failed attempts, which double from POLL."""
HANDOVER = 180.0
"""Seconds that a follower waits for its predecessor."""
TERM_GRACE = 25.0
"""Seconds from SIGTERM to the follower's end; DeepSpeed's launcher and Slurm send SIGKILL after 30."""


class Following:
    """The follower's life: from the start of a run to the last confirmed upload, or to giving up."""

    def __init__(self, folder: RunFolder, uri: str, patience: float) -> None:
        self.folder, self.uri, self.patience = folder, uri, patience
        self.writer = folder.writer
        self._give_up_at = math.inf
        self._uploader: Uploader | None = None
        self._system: SystemMetrics | None = None

    def run(self) -> bool:
        """True: the run has ended and MLflow knows all of it. False: gave up, `patience` seconds after the run's end,
        after a SIGTERM, or because another process took the run over and brought its own follower."""
        pause, ended = POLL, False
        while not self.is_superseded():
            if self.folder.has_ended and not ended:
                ended = True
                self.give_up_in(self.patience)
            try:
                if self.upload():
                    return True
                pause = POLL
            except Exception as error:  # no failure of a store may do more than this
                log(f"attempt failed: {shown(error)}; next in {pause:.0f} s")
                self._uploader = self._system = None
                pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() >= self._give_up_at:
                log(f"gave up; `qatscale track-sync {self.folder.path}` uploads the rest")
                return False
            self.sleep(pause, until_end=not ended)
        log("another process continues this run and has its own follower")
        return False

    def upload(self) -> bool:
        """One attempt. The uploader is made when the store first answers, and made anew after a failure."""
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

    def sleep(self, seconds: float, until_end: bool) -> None:
        """Sleep, but not past the moment in which the run ends or it is time to give up."""
        end = time.monotonic() + seconds
        while time.monotonic() < min(end, self._give_up_at) and not (until_end and self.folder.has_ended):
            time.sleep(0.2)


def log(text: str) -> None:
    print(f"{datetime.now().isoformat(timespec='seconds')} {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qatscale.tracking.follower", description="Upload a run to MLflow.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    arguments = parser.parse_args()
    os.nice(10)  # training goes first
    following = Following(RunFolder.open(arguments.folder), arguments.uri, arguments.patience)
    signal.signal(signal.SIGTERM, lambda *_: following.give_up_in(TERM_GRACE))
    try:
        # a former follower of this run, left by a trainer that was killed, may still be at its last upload: it sees
        # that another process took over and leaves. Should it not, it hangs, and the lock is never forced.
        with quiet_mlflow(), locked(lock_file(following.folder), HANDOVER, give_up=following.is_superseded):
            return 0 if following.run() else 1
    except HeldError as error:
        log(f"not started: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
