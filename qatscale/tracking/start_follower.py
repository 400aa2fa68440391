"""The trainer's side of the upload to MLflow: start the follower, a process of its own, and wait for it at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Protocol

from qatscale.tracking.cursor import Cursor
from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.store import resolve_uri

PATIENCE = 120.0
"""Seconds after the run's end in which the follower keeps trying."""


class Follower(Protocol):
    def finish(self, seconds: float = 30.0) -> str | None:
        """Wait at most `seconds` for the upload to end; a line for the user where something is left to do."""
        ...


class NoFollower:
    """In the place of a follower: on ranks other than 0, and where tracking is off."""

    def finish(self, seconds: float = 30.0) -> str | None:  # noqa: ARG002
        return None


class FollowerProcess:
    """The trainer's hand on its follower."""

    def __init__(self, folder: RunFolder, child: subprocess.Popen[bytes]) -> None:
        self.folder, self.child = folder, child

    def finish(self, seconds: float = 30.0) -> str | None:
        try:
            code = self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            why = f"is not finished after {seconds:.0f} s; it continues in the background"
        else:
            if code == 0:
                return None
            why = "failed"
        log = self.folder.logs / "tracking.log"
        return f"The upload to MLflow {why} (see {log}). `qatscale track-sync {self.folder.path}` uploads the rest."


def start_follower(folder: RunFolder, uri: str | None, patience: float = PATIENCE) -> Follower:
    """Start the upload of a run and return at once. Call it on rank 0, after the `start` or `resume` event, which says
    whose life the follower watches. `uri`: tracking.uri of the recipe, see `resolve_uri`."""
    cursor = Cursor.load(folder)
    resolved = resolve_uri(uri, known=cursor.uri if cursor else None)
    if resolved is None:
        return NoFollower()
    if cursor is None or cursor.uri != resolved:
        Cursor.at(folder, resolved).save(folder)  # `track-sync` knows where to, even if the store never answers
    folder.logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "qatscale.tracking.follower", str(folder.path.resolve())]
    command += ["--uri", resolved, "--patience", str(patience)]
    with (folder.logs / "tracking.log").open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C and a launcher's kill of the process group are not for the follower
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return FollowerProcess(folder, child)
