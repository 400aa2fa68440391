"""The watch of a job: a thread per process that sees when another is dead, stopped, cut off or hangs, and ends the job.

A process that dies takes no other with it: the others wait for it in a collective, for the half hour of a process
group's timeout or for ever (NCCL), while the machines are paid for. So every process pins a note on a board every few
seconds (host, step, how long since it last got on) and looks at its neighbour's, the next rank. What it looks for:

- a process of this host is gone: seen at once, by its id;
- no sign of life of the neighbour, or of the board, for `silence` seconds: dead, stopped, cut off;
- nobody's death, but no progress for `stall_timeout` seconds: somebody hangs.

Whoever sees something, or gets an exception, raises the alarm. Then all say how they stand, on the board and in a file
beside their logs, the lowest rank that answers tells the first failure whole (see `faults`), and all end, with
EXIT_FAILED. The board's host may be the one that is gone, and the main thread may hang in a call that never returns:
nothing here waits for either.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import torch.distributed as dist

from qatscale.engine.runtime import Runtime
from qatscale.errors import EXIT_FAILED, UserError
from qatscale.files import write_json_atomic
from qatscale.supervise.failure_report import (
    Fault,
    Kind,
    first_fault,
    in_communication,
    is_consequence,
    job_faults,
    message,
)
from qatscale.supervise.guard import Guard, Launchers
from qatscale.supervise.heartbeat import Board, Note
from qatscale.supervise.process import identity, is_alive

SLOW = 1800.0
"""Seconds on top of stall_timeout for what may take long: start and first step (compilation), saving, evaluation."""
SILENCE = 60.0
"""Seconds without a sign of life after which a process counts as dead; a shorter stall_timeout, if it is shorter."""
PERIOD = 2.0
"""Seconds between two notes."""
GATHER = 10.0
"""Seconds for all to say how they stand, and for one to tell it. Launchers kill the rest 30 s after the first left."""
LAST_WORDS = 3.0
"""Seconds after an alarm for the main thread to meet an exception of its own, before the watch speaks for it."""
GUARD = 30.0
"""Seconds after SILENCE in which a process that gives no sign of life is killed; the others have told of it by then."""
MAX_TEXT = 20_000
"""Characters of a traceback that travel, from its end."""


def collective_timeout(stall_timeout: float | None) -> float | None:
    """Seconds for the process group's own timeout: after the watch's, which can say who and why. None = its default."""
    return None if stall_timeout is None else stall_timeout + SLOW + 2 * SILENCE


class Watch:
    """A context around everything that a process does in a job. Collective to enter.

    In a job of several processes an exception does not come out of it: it is told, once for the whole job, and the
    process ends. UserErrors do come out, and so does everything in a job of one process.
    """

    def __init__(self, runtime: Runtime, logs: Path, stall_timeout: float | None) -> None:
        self.runtime, self.logs, self.stall_timeout = runtime, logs, stall_timeout
        self.hosts: dict[str, list[int]] = {}
        """Host → its ranks."""
        self.clock_notices: list[str] = []
        self.on_failure: Callable[[Fault, Fault], None] | None = None
        """Called once with the job's first failure and what there is to say of this process, before it ends; from
        whichever thread notices."""
        self.waits_for: Callable[[], int | None] = lambda: None
        """The thread that the main one waits for at this moment, if it does: then that one hangs, or does not."""
        self._silence = min(SILENCE, stall_timeout or SILENCE)
        self._period = min(PERIOD, self._silence / 5)
        self._step, self._slow, self._progress = 0, True, time.monotonic()
        self._process = identity()
        self._state: Literal["training", "left", "ended", "told"] = "training"
        self._own: Fault | None = None
        self._seen: Fault | None = None
        self._faults: list[Fault] = []
        self._count = 0
        self._job = uuid.uuid4().hex
        self._board: Board | None = None
        self._guard: Guard | None = None
        self._siblings: dict[int, dict[str, Any]] = {}
        self._neighbour = (runtime.rank + 1) % runtime.ranks
        self._heard: tuple[int, float] = (-1, time.monotonic())
        self._alarm_since: float | None = None
        self._settling = threading.Lock()
        self._closed = threading.Event()

    def mark(self, step: int, slow: bool = False) -> None:
        """`step` steps are done and the process gets on. `slow`: what comes next may take SLOW seconds longer."""
        self._step, self._slow, self._progress = step, slow, time.monotonic()

    # begin and end

    def __enter__(self) -> Self:
        if self.runtime.ranks > 1:
            self._file(self.runtime.rank).unlink(missing_ok=True)
            self._board = Board(self.runtime.rank, self.runtime.ranks, self._note(), self._period)
            self._meet(self._board)
            if self.stall_timeout is not None:
                self._guard = Guard(self._silence + GUARD)
        else:
            self.hosts = {self._process["host"]: [0]}
        self._launchers = Launchers()
        threading.Thread(target=self._look_on, name="watch", daemon=True).start()
        return self

    def _meet(self, board: Board) -> None:
        """Learn who else is in the job."""
        self._job = board.notes[0]["job"]
        for rank, note in sorted(board.notes.items()):
            self.hosts.setdefault(note["process"]["host"], []).append(rank)
            # asked now: two containers may share host name and boot id, but not process ids
            if rank != self.runtime.rank and is_alive(note["process"]):
                self._siblings[rank] = note["process"]
        board.follow([self._neighbour])
        for host, ranks in self.hosts.items():
            offset = min((board.offsets[rank] for rank in ranks), key=abs)
            if abs(offset) > 1:
                self.clock_notices.append(
                    f"the clock of host {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} rank 0's"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, UserError) and self._board is not None:
            self.settle(error)
            self._end()
        if isinstance(error, UserError):
            self._own = self._fault_here("error", f"error: {error}", "")
        self._state = "left"
        self._closed.set()
        if self._guard is not None:
            self._guard.close()
        if self._board is not None:
            self._board.pin(self._note())
            self._board.hurry(wait=2)
            if self.runtime.is_main:
                self._let_others_leave(self._board)
            self._board.close()

    def _let_others_leave(self, board: Board) -> None:
        """The board usually lives in this process: the others must not take its end for a failure."""
        board.follow(range(self.runtime.ranks))
        until = time.monotonic() + GATHER
        while time.monotonic() < until and not board.lost:
            board.hurry(wait=0.5)
            if all(note["state"] != "training" for note in board.notes.values()):
                return

    # look on

    def _look_on(self) -> None:
        while not self._closed.wait(0.2 if self._alarm_since else self._period):
            if self._guard is not None:
                self._guard.alive()
            if self._launchers.gone():
                self._launchers = Launchers()  # say it once
                logging.getLogger("qatscale").warning("the launcher is gone, which is taken for SIGTERM")
                os.kill(os.getpid(), signal.SIGTERM)
            if self._board is not None:
                self._board.pin(self._note())
            if self._alarm_since is None:
                self._alarm_since = time.monotonic() if self._trouble() else None
                continue
            since = time.monotonic() - self._alarm_since
            if since > LAST_WORDS and not self._own:  # the main thread has nothing to say
                self.settle(None)
                self._end()
            elif since > LAST_WORDS + 2 * GATHER:  # it began to, and does not come to an end
                self._end()

    def _trouble(self) -> bool:
        """Whether the job has to end. What this process has seen of another is kept in `_seen`."""
        board = self._board
        if board is not None and board.alarm:
            return True
        if self.stall_timeout is None:
            return False
        if board is not None:
            self._seen = self._trouble_of_others(board)
        limit = self.stall_timeout + (SLOW if self._slow else 0)
        if self._seen is None and time.monotonic() - self._progress <= limit:
            return False
        if board is not None:
            board.pin(self._note())
            board.raise_alarm()
        return True

    def _trouble_of_others(self, board: Board) -> Fault | None:
        for rank, process in self._siblings.items():
            if is_alive(process) is False and not self._has_left(board, rank):
                return self._fault_of(rank, "gone", "its process ended without a word (SIGKILL? out of memory?)")
        if board.lost:
            return self._fault_of(0, "gone", "its process, or the launcher's that keeps the store, broke off")
        if board.age > self._silence:
            return self._fault_of(0, "silent", f"the store on its host has not answered for {board.age:.0f} s")
        note = board.notes[self._neighbour]
        if note["count"] != self._heard[0] or note["state"] != "training":
            self._heard = note["count"], time.monotonic()
        silent = time.monotonic() - self._heard[1]
        if silent > self._silence:
            return self._fault_of(self._neighbour, "silent", f"no sign of life for {silent:.0f} s")
        return None

    def _has_left(self, board: Board, rank: int) -> bool:
        """Whether a process that is gone left in order. Its last note may be newer than what was read of it."""
        board.follow({self._neighbour, rank})
        board.hurry(wait=1)
        return board.notes[rank]["state"] != "training"

    # end the job

    def settle(self, error: BaseException | None) -> Fault:
        """The job has failed, with `error` here or (None) elsewhere: find out where first. Takes up to GATHER seconds;
        the second call returns what the first one found."""
        with self._settling:
            if not self._faults:
                self._own = self._fault_of_self(error)
                if self._board is None or isinstance(error, UserError):
                    self._faults = [self._own]
                else:
                    if threading.current_thread() is threading.main_thread():
                        for number in (signal.SIGTERM, signal.SIGUSR1):
                            signal.signal(number, signal.SIG_IGN)  # launchers end the others when one has failed
                    self._faults = self._gather(self._board)
                first = first_fault(self._faults)
                try:
                    if self.on_failure is not None:
                        self.on_failure(first, self._own)
                except Exception:  # a full disk, say: whatever else fails now, the failure must be told
                    logging.getLogger("qatscale").exception("while the failure was recorded")
            return first_fault(self._faults)

    def _gather(self, board: Board) -> list[Fault]:
        """Say how this process stands, and hear all others; who does not answer in time is silent."""
        self._alarm_since = self._alarm_since or time.monotonic()
        self._state = "ended"
        self._publish(board)
        board.raise_alarm()
        until = time.monotonic() + GATHER
        while True:
            answers = self._answers(board)
            missing = set(range(self.runtime.ranks)) - answers.keys()
            gone = {rank for rank in missing if rank in self._siblings and is_alive(self._siblings[rank]) is False}
            if missing <= gone or time.monotonic() > until:
                break
            time.sleep(0.1)
        left_out = {
            rank: self._fault_of(rank, "gone", "its process ended without a word (SIGKILL? out of memory?)")
            if rank in gone
            else self._fault_of(rank, "silent", "no sign of life: dead, stopped or cut off")
            for rank in missing
        }
        return job_faults(list(answers.values()), left_out)

    def _end(self) -> NoReturn:
        """Tell the first failure if it falls to this process, and end it, whatever its other threads are doing."""
        board, rank = self._board, self.runtime.rank
        speaker = min(self._answers(board)) if board is not None else rank
        if speaker == rank:
            print(message(self._faults, str(self.logs)), file=sys.stderr, flush=True)
        if board is not None:
            self._state = "told"
            self._publish(board)
            until = time.monotonic() + GATHER / 2
            while time.monotonic() < until and not board.lost:  # who leaves first makes the launcher end the others
                answers = self._answers(board)
                everybody = all(answer["state"] == "told" for answer in answers.values())
                if everybody or (rank != 0 and answers[speaker]["state"] == "told"):
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        os._exit(EXIT_FAILED)

    def _publish(self, board: Board) -> None:
        """On the board, and in a file for those who cannot reach it."""
        note = self._note()
        board.pin(note)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._file(self.runtime.rank), note)
        except OSError:
            logging.getLogger("qatscale").exception("the record of the failure was not written")
        board.hurry(wait=1)

    def _answers(self, board: Board) -> dict[int, Note]:
        """Rank → the note of each that has come to an end."""
        notes = dict(board.notes)
        for rank in range(self.runtime.ranks):
            if notes[rank]["state"] in ("training", "ended"):
                try:
                    note = json.loads(self._file(rank).read_text())
                except (OSError, ValueError):
                    continue
                if note["job"] == self._job:
                    notes[rank] = note
        notes[self.runtime.rank] = self._note()
        return {rank: note for rank, note in notes.items() if note["state"] != "training"}

    def _file(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.fault.json"

    # notes and faults

    def _note(self) -> Note:
        self._count += 1
        frames = _stack(self.waits_for()) or _stack(threading.main_thread().ident)
        return {
            "rank": self.runtime.rank,
            "job": self._job,
            "process": self._process,
            "count": self._count,
            "state": self._state,
            "step": self._step,
            "waits": in_communication([(frame.filename, frame.name) for frame in reversed(frames)]),
            "collectives": _collectives() if self._board is not None else 0,
            "fault": self._own.to_dict() if self._own else None,
            "seen": self._seen.to_dict() if self._seen else None,
        }

    def _fault_here(self, kind: Kind, error: str, text: str) -> Fault:
        board = self._board
        now = time.time() - (board.offsets[self.runtime.rank] if board is not None else 0.0)
        return Fault(self.runtime.rank, self._process["host"], self._step, now, kind, error, text[-MAX_TEXT:])

    def _fault_of(self, rank: int, kind: Kind, error: str) -> Fault:
        assert self._board is not None
        note = self._board.notes[rank]
        now = time.time() - self._board.offsets[self.runtime.rank]
        step = max(note["step"], self._step)  # its note may be old, and the others do not get past it
        return Fault(rank, note["process"]["host"], step, now, kind, error)

    def _fault_of_self(self, error: BaseException | None) -> Fault:
        if error is not None:
            kind: Kind = "consequence" if self._board is not None and is_consequence(error) else "error"
            told = traceback.format_exception_only(error)[-1].strip()
            return self._fault_here(kind, told, "".join(traceback.format_exception(error)))
        waited = f"no progress for {time.monotonic() - self._progress:.0f} s"
        stands = {"The main thread stood at\n": threading.main_thread().ident, "and waited for\n": self.waits_for()}
        stack = "".join("".join([said, *traceback.format_list(_stack(at))]) for said, at in stands.items() if at)
        return self._fault_here("witness" if self._board is not None else "stalled", waited, stack)


def _stack(thread: int | None) -> list[traceback.FrameSummary]:
    """A thread's stack, outermost first, without reading any source file; empty where there is no such thread."""
    frame = sys._current_frames().get(thread or 0)
    return traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)[::-1]


def _collectives() -> int:
    """How many collectives this process has entered since its start, over all groups."""
    groups = dist.distributed_c10d._world.pg_map  # the only list of groups there is
    return sum(group._get_sequence_number_for_group() for group in list(groups))  # type: ignore[attr-defined]
