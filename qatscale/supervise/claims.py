"""Who trains which run: claims in a shared folder, and the heartbeats of those who hold them.

    claims/NAME~0001.json    {"worker", "process", "state", "reason", "started", "ended"}

A study's workers claim its runs. Whoever trains a run holds the claim on its folder, too: see `hold_run`.

Each attempt at a run is a numbered file. Creating a file that must not exist yet is atomic on every file system that
hosts share, so only one of the workers that want an attempt gets it. The holder touches the file at every heartbeat. A
claim whose holder is gone is superseded by the next number, and others never change it. A worker that finds a higher
number than its own has lost the run and must stop at once.

Hosts' clocks are not compared: a holder counts as gone once its file has not changed for EXPIRY seconds on the
observer's clock, or at once where the observer can see that the process has ended.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from qatlaw.files import naming, read_small
from qatscale.errors import EXIT_FAILED, UserError
from qatscale.files import write_json
from qatscale.supervise.process import identity, is_alive

HEARTBEAT = 10.0
"""Seconds between the heartbeats of a holder."""
EXPIRY = 120.0
"""Seconds without a heartbeat after which a holder on another host is gone; network disks show changes late."""

_NAME = re.compile(r"(.+)~(\d{4}|[1-9]\d{4,8})\.json", re.ASCII)
State = Literal["running", "gone", "released", "failed", "done"]
"""`gone`: the holder vanished. `released`: it stopped after saving. The holder itself writes the last three."""


class Identity(TypedDict):
    """As `process.identity` gives it."""

    host: str
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    boot_id: str | None
    namespace: NotRequired[str | None]
    start_ticks: int | None


class Attempt(BaseModel):
    """One numbered attempt at a run, as an observer sees it: what its file holds, and whether its holder lives."""

    worker: str = "an unknown host-?"
    process: Identity | None = None
    state: State = "running"
    reason: str = ""
    started: float = 0.0
    ended: float | None = None
    name: str = ""
    number: int = 0
    path: str = ""
    alive: bool | None = None
    """Whether its process runs, as is seen here or from its heartbeat; None where that is not known yet."""
    damage: str = ""
    """Why its file does not say who holds it."""

    @property
    def holder(self) -> str:
        host, _, pid = self.worker.rpartition("-")
        return f"a process that {self.path} does not name" if self.damage else f"process {pid} on host {host}"


def worker_name(pid: int) -> str:
    """The name of a worker on this host, by its process id."""
    return f"{socket.gethostname()}-{pid}"


class Claims:
    """The claims of a study, seen from one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[Path, tuple[float, float]] = {}
        """File → (its time of change, when this process first saw that on its own clock)."""

    def _numbers(self) -> dict[str, list[int]]:
        """The attempts at each run that has one, ascending."""
        numbers: dict[str, list[int]] = {}
        for entry in os.scandir(self.folder) if self.folder.is_dir() else ():
            if found := _NAME.fullmatch(entry.name):
                numbers.setdefault(found[1], []).append(int(found[2]))
        return {name: sorted(found) for name, found in numbers.items()}

    def attempts(self) -> dict[str, Attempt]:
        """The latest attempt at each run that has one."""
        return {name: self._look(name, numbers[-1]) for name, numbers in self._numbers().items()}

    def history(self, name: str) -> list[Attempt]:
        return [self._look(name, number) for number in self._numbers().get(name, ())]

    def has_claimed(self, worker: str) -> bool:
        found = self._numbers().items()
        return any(self._look(name, number).worker == worker for name, numbers in found for number in numbers)

    def held(self, notice: Callable[[str], None]) -> list[Attempt]:
        """The attempts whose holders live, once that is known: whom nobody here can see is watched for up to EXPIRY."""
        watched: set[str] = set()
        while running := [one for one in self.attempts().values() if one.state == "running"]:
            if alive := [one for one in running if one.alive]:
                return alive
            for one in running:
                if one.path not in watched:
                    why = one.damage or f"names {one.holder}, which cannot be seen from here"
                    notice(f"note: {one.path} {why}; watching its heartbeat for {EXPIRY:.0f} s at most")
            watched |= {one.path for one in running}
            time.sleep(1)
        return []

    def take(self, name: str, after: int, worker: str) -> Claim | None:
        """Claim the attempt that follows number `after`; None if another worker was faster."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name, after + 1)
        content = {"worker": worker, "process": identity(), "state": "running", "started": time.time()}
        try:
            file = path.open("x")
        except FileExistsError:
            return None
        try:
            with naming(path), file:
                json.dump(content, file)
        except OSError:  # a full disk; an empty claim would be watched until it expires
            path.unlink(missing_ok=True)
            raise
        return Claim(path, self._path(name, after + 2), content)

    def release(self, failed: Attempt, reason: str) -> None:
        """Let workers try a failed run again."""
        if claim := self.take(failed.name, failed.number, "retry"):
            claim.close("released", reason)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}~{number:04d}.json"

    def _look(self, name: str, number: int) -> Attempt:
        path, attempt, changed, damage = self._path(name, number), Attempt(), 0.0, ""
        try:
            found = path.stat()
            changed = found.st_mtime
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                raise OSError(errno.EINVAL, "not a file")
            attempt = Attempt.model_validate_json(read_small(path), strict=True)
        except OSError as error:  # expires like a silent one
            damage = f"cannot be read ({error.strerror})"
        except ValueError:  # being written, or damaged
            damage = "is damaged" if found.st_size else "is empty"
        # a holder writes its process at once
        alive = is_alive(attempt.process, changed) if attempt.process else None if damage else False
        alive = self._beats(path, changed) if alive is None else alive
        state = "gone" if attempt.state == "running" and alive is False else attempt.state
        seen = {"name": name, "number": number, "state": state, "path": str(path), "alive": alive, "damage": damage}
        return attempt.model_copy(update=seen)

    def _beats(self, path: Path, changed: float) -> bool | None:
        """Whether a file has changed since the last look; None where that may still come."""
        now = time.monotonic()
        before, since = self._seen.setdefault(path, (changed, now))
        if changed == before:
            return None if now - since <= EXPIRY else False
        self._seen[path] = (changed, now)
        return True


class Claim:
    def __init__(self, path: Path, successor: Path, content: dict[str, Any]) -> None:
        self.path, self.successor, self.content = path, successor, content
        self._began, self._closed = time.monotonic(), threading.Event()
        self._thread: threading.Thread | None = None

    def beat_until_closed(self, lost: Callable[[], None]) -> None:
        """Start the heartbeat. `lost` is called from its thread if another worker has taken the run over."""

        def beat() -> None:
            while not self._closed.wait(HEARTBEAT) and not self._is_lost():
                with contextlib.suppress(OSError):  # a disk that does not answer now may do so later
                    os.utime(self.path)
            if not self._closed.is_set():
                lost()

        self._thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, state: State, reason: str = "") -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if not self._is_lost():
            ended = self.content["started"] + time.monotonic() - self._began  # whatever was done to the clock
            write_json(self.path, {**self.content, "state": state, "reason": reason, "ended": ended})

    def _is_lost(self) -> bool:
        """Whether another process has the run: it claimed the next attempt, or this one after somebody removed it."""
        with contextlib.suppress(OSError, ValueError):
            found = self.successor.exists() or Attempt.model_validate_json(self.path.read_bytes()).process
            return found not in (False, None, self.content["process"])
        return False


# --- the one writer of a run folder: the claims in its folder writers/ ---


def hold_run(run: Path, *, take_over: bool, notice: Callable[[str], None]) -> Claim:
    """The claim to write a run folder, with its heartbeat. UserError where another process holds it.

    A holder on another host cannot be seen, so its heartbeat is watched for up to EXPIRY seconds. take_over: claim the
    folder from a holder that may be alive, which ends at its next heartbeat.
    """
    claims = Claims(run / "writers")
    claim = None
    while claim is None:
        latest = claims.attempts().get("writer")  # whoever claims it after this is not superseded
        if not take_over and (held := claims.held(notice)):
            problem = f"{run} is being trained by {held[0].holder}."
            raise UserError("name", run.name, problem, "Wait, stop it, or end it from here with --take-over.")
        claim = claims.take("writer", latest.number if latest else 0, worker_name(os.getpid()))
    claim.beat_until_closed(lambda: end_taken_over(run))
    if take_over and latest is not None and latest.state == "running":
        notice(f"note: {run} is taken over; its former process has {2 * HEARTBEAT:.0f} s to notice")
        time.sleep(2 * HEARTBEAT)
    return claim


def end_taken_over(run: Path | str) -> None:
    """End this process at once: another one saw no heartbeat, or was asked to take the run over, and writes it now."""
    print(f"error: {run} was taken over by another process", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILED)
