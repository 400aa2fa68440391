"""The watchdog of a job: a thread per process that notices a process that died, stopped, was cut off or hangs.

When a process dies, the others wait for it in a collective: half an hour (a process group's timeout) or for ever
(NCCL), while the machines cost money. So every process publishes a heartbeat every few seconds (host, step, whether it
waits) and reads that of its neighbour, the next rank. It looks for:

- a process of this host that has ended: noticed at once, by its process id;
- no heartbeat of the neighbour, or no answer of the store, for `silence` seconds: dead, stopped, cut off;
- heartbeats of all, but no progress for `stall_timeout` seconds: some process hangs.

A process that sees one of these, or meets an exception, raises the alarm. Then each process reports its state, in the
store and in a file beside its log. The first process of each host collects the states of all, and the others of the
host take over its verdict. The lowest rank that answers prints the failure report, and all end with EXIT_FAILED. The
store's host may be the one that died, and the main thread may hang in a call that never returns: nothing here waits for
either.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import torch.distributed as dist

from qatscale.engine.runtime import Runtime
from qatscale.errors import EXIT_FAILED, UserError, fault
from qatscale.files import write_json
from qatscale.supervise.failure_report import Failure, Kind, first_failure, is_consequence, job_failures, report
from qatscale.supervise.heartbeat import Heartbeat, HeartbeatStore
from qatscale.supervise.process import LauncherProcesses, WatchdogProcess, identity, is_alive, launched_by

SLOW = 1800.0
"""Seconds on top of stall_timeout for what may take long: start and first step (compilation), saving, evaluation."""
SILENCE = 60.0
"""Seconds without a heartbeat after which a process counts as dead; a shorter stall_timeout, if it is shorter."""
PERIOD = 2.0
"""Seconds between two heartbeats."""
GATHER = 10.0
"""Seconds for all to report their state, and for one to print. Launchers kill the rest 30 s after the first exit."""
POLL = 0.1
"""Seconds between two looks at what has been answered."""
OWN_ERROR = 3.0
"""Seconds after an alarm for the main thread to meet an exception of its own, before the watchdog speaks for it."""
KILL = 30.0
"""Seconds after SILENCE at which a process without a heartbeat is killed; the others have reported it by then."""
_WAITS = ("torch/distributed/", "deepspeed/comm/", "engine/agreement.py")
MAX_TEXT = 20_000
"""Characters of a traceback that travel, from its end."""
LOST = "its process ended without a word (SIGKILL? out of memory?)"


def collective_timeout(stall_timeout: float | None) -> float | None:
    """Seconds for the process group's own timeout; None = its default.

    It lies behind that of the watchdog, which can say which process hangs and where.
    """
    return None if stall_timeout is None else stall_timeout + SLOW + 2 * SILENCE


class Watchdog:
    """A context around everything that a process does in a job. Collective to enter.

    In a job of several processes an exception does not leave it: it is reported once for the entire job, and the
    process ends. UserErrors do leave it, and so does everything in a job of one process.
    """

    def __init__(
        self,
        runtime: Runtime,
        logs: Path,
        stall_timeout: float | None,
        record: Callable[[Failure, Failure], None] | None = None,
    ) -> None:
        """record: called once, by any thread, with the job's first failure and this process's own, before it ends."""
        self.runtime, self.logs, self.stall_timeout = runtime, logs, stall_timeout
        self.hosts: dict[str, list[int]] = {}
        """Host → its ranks."""
        self.clock_notices: list[str] = []
        self._record = record
        self._waited: int | None = None
        self._silence = min(SILENCE, stall_timeout or SILENCE)
        self._period = min(PERIOD, self._silence / 5)
        self._step, self._slow, self._progress = 0, True, time.monotonic()
        self._process = identity()
        self._state: Literal["training", "left", "ended", "reported"] = "training"
        self._own: Failure | None = None
        self._seen: Failure | None = None
        self._stalled = False
        self._failures: list[Failure] = []
        self._verdict: dict[str, Any] | None = None
        self._collects = False
        self._looked = 0.0
        self._written: dict[int, Heartbeat] = {}
        self._reporter = runtime.rank
        self._count = 0
        self._job = uuid.uuid4().hex
        self._store: HeartbeatStore | None = None
        self._killer: WatchdogProcess | None = None
        self._siblings: dict[int, dict[str, Any]] = {}
        self._neighbour = (runtime.rank + 1) % runtime.ranks
        self._heard: tuple[int, float] = (-1, time.monotonic())
        self._alarm_since: float | None = None
        self._resolving = threading.Lock()
        self._closed = threading.Event()

    def progress(self, step: int, slow: bool = False) -> None:
        """`step` steps are done. `slow`: the next one may take SLOW seconds longer."""
        self._step, self._slow, self._progress = step, slow, time.monotonic()

    @contextmanager
    def waiting_for(self, thread: int | None) -> Iterator[None]:
        """A context in which the main thread waits for another one: if something hangs, it is that thread."""
        self._waited = thread
        try:
            yield
        finally:
            self._waited = None

    # --- begin and end ---

    def __enter__(self) -> Self:
        if self.runtime.ranks > 1:
            self._file(self.runtime.rank).unlink(missing_ok=True)
            self._store = HeartbeatStore(self.runtime.rank, self.runtime.ranks, self._heartbeat(), self._period)
            self._meet(self._store)
            if self.stall_timeout is not None:
                self._killer = WatchdogProcess(self._silence + KILL)
        else:
            self.hosts = {self._process["host"]: [0]}
        self._launchers = launched_by()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def _meet(self, store: HeartbeatStore) -> None:
        """Learn which processes are in the job."""
        self._job = store.heartbeats[0]["job"]
        for rank, heartbeat in sorted(store.heartbeats.items()):
            self.hosts.setdefault(heartbeat["process"]["host"], []).append(rank)
            # asked now: two containers may share host name and boot id, but not process ids
            if rank != self.runtime.rank and is_alive(heartbeat["process"]):
                self._siblings[rank] = heartbeat["process"]
        store.follow([self._neighbour])
        for host, ranks in self.hosts.items():
            offset = min((store.offsets[rank] for rank in ranks), key=abs)
            if abs(offset) > 1:
                self.clock_notices.append(
                    f"the clock of host {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} rank 0's"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, UserError) and self._store is not None:
            self.resolve_failure(error)
            self._end()
        if isinstance(error, UserError):
            self._own = self._failure_of(self.runtime.rank, "error", f"error: {error}", "")
        self._state = "left"
        self._closed.set()
        if self._killer is not None:
            self._killer.close()
        if self._store is not None:
            self._store.publish(self._heartbeat())
            self._store.flush(wait=2)
            if self.runtime.is_main:
                self._let_others_leave(self._store)
            self._store.close()

    def _let_others_leave(self, store: HeartbeatStore) -> None:
        """The store usually lives in this process: the others must not take its end for a failure."""
        store.follow(range(self.runtime.ranks))
        until = time.monotonic() + GATHER
        while time.monotonic() < until and not store.lost:
            store.flush(wait=0.5)
            if all(heartbeat["state"] != "training" for heartbeat in store.heartbeats.values()):
                return

    # --- watch ---

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(pause := 0.2 if self._alarm_since else self._period):
            now = time.monotonic()
            self._forgive(now - before - pause)
            before = now
            if self._killer is not None:
                self._killer.alive()
            if self._launchers.gone():
                self._launchers = LauncherProcesses()  # signal only once
                logging.getLogger("qatscale").warning("the launcher is gone, which counts as SIGTERM")
                os.kill(os.getpid(), signal.SIGTERM)
            if self._store is not None:
                self._store.publish(self._heartbeat())
            if self._alarm_since is None:
                self._alarm_since = time.monotonic() if self._must_end() else None
                continue
            since = time.monotonic() - self._alarm_since
            if since > OWN_ERROR and not self._own:  # the main thread has met no exception
                self.resolve_failure(None)
                self._end()
            elif since > OWN_ERROR + 2 * GATHER:  # it met one and does not end
                self._end()

    def _forgive(self, late: float) -> None:
        """This thread woke `late` seconds too late: where that is long, the process was stopped and continued, or its
        machine slept. Nothing could make progress meanwhile, and nothing could be heard."""
        if late > self._silence / 2:
            self._progress += late
            self._heard = self._heard[0], self._heard[1] + late
            if self._store is not None:
                self._store.forgive(late)

    def _must_end(self) -> bool:
        """Whether the job must end. A failure that this process has seen of another is kept in `_seen`."""
        store = self._store
        if store is not None and store.alarm:
            return True
        if self.stall_timeout is None:
            return False
        if store is not None:
            self._seen = self._failure_of_others(store)
        # Twice in a row: when a virtual machine wakes up, its clock may jump after this thread has looked at it.
        limit = self.stall_timeout + (SLOW if self._slow else 0)
        before, self._stalled = self._stalled, time.monotonic() - self._progress > limit
        if self._seen is None and not (before and self._stalled):
            return False
        if store is not None:
            store.publish(self._heartbeat())
            store.raise_alarm()
        return True

    def _failure_of_others(self, store: HeartbeatStore) -> Failure | None:
        for rank in self._siblings:
            if self._is_gone(rank) and not self._has_left(store, rank):
                return self._failure_of(rank, "gone", LOST)
        if store.lost:
            return self._failure_of(0, "gone", "its process, or the launcher's that keeps the store, broke off")
        if store.age > self._silence:
            return self._failure_of(0, "silent", f"the store on its host has not answered for {store.age:.0f} s")
        heartbeat = store.heartbeats[self._neighbour]
        if heartbeat["count"] != self._heard[0] or heartbeat["state"] != "training":
            self._heard = heartbeat["count"], time.monotonic()
        silent = time.monotonic() - self._heard[1]
        if silent > self._silence:
            return self._failure_of(self._neighbour, "silent", f"no heartbeat for {silent:.0f} s")
        return None

    def _has_left(self, store: HeartbeatStore, rank: int) -> bool:
        """Whether a process that is gone left in order. Its last heartbeat may be newer than the one that was read."""
        store.follow({self._neighbour, rank})
        store.flush(wait=1)
        return store.heartbeats[rank]["state"] != "training"

    # --- end the job ---

    def resolve_failure(self, error: BaseException | None) -> Failure:
        """The job has failed, with `error` here or (None) elsewhere: find and record its first failure.

        Takes up to GATHER seconds. A second call returns what the first one found.
        """
        with self._resolving:
            if not self._failures:
                self._own = self._failure_of_self(error)
                if self._store is None or isinstance(error, UserError):
                    self._failures = [self._own]
                else:
                    if threading.current_thread() is threading.main_thread():
                        for number in (signal.SIGTERM, signal.SIGUSR1):
                            signal.signal(number, signal.SIG_IGN)  # launchers end the others when one has failed
                    self._failures = self._gather(self._store)
                try:
                    if self._record is not None:
                        self._record(first_failure(self._failures), self._own)
                except Exception:  # a full disk, say: the failure must be reported whatever else fails now
                    logging.getLogger("qatscale").exception("while the failure was recorded")
            return first_failure(self._failures)

    def _gather(self, store: HeartbeatStore) -> list[Failure]:
        """Publish this process's state and collect those of the others, or take over what another one has collected."""
        self._alarm_since = self._alarm_since or time.monotonic()
        self._state = "ended"
        self._publish(store)
        store.raise_alarm()
        self._looked = time.monotonic()
        until = self._looked + GATHER
        while (collector := self._collector()) != self.runtime.rank and time.monotonic() < until + 2 * OWN_ERROR:
            store.follow([collector])
            answer = self._answers(store, [collector]).get(collector)
            if answer and (verdict := answer["verdict"]):
                self._reporter = verdict["reporter"]
                return [Failure(**verdict["first"])]
            time.sleep(POLL)
        return self._collect(store, until)

    def _collector(self) -> int:
        """The first process of this host that is not known to be gone."""
        own = self.hosts[self._process["host"]]
        return next(rank for rank in own if not self._is_gone(rank))

    def _is_gone(self, rank: int) -> bool:
        return rank in self._siblings and is_alive(self._siblings[rank]) is False

    def _collect(self, store: HeartbeatStore, until: float) -> list[Failure]:
        """The failures of all; a process that does not answer in time is silent."""
        self._collects, ranks = True, range(self.runtime.ranks)
        store.follow(ranks)
        store.flush(wait=1)
        while True:
            answers = self._answers(store, ranks)
            missing = set(ranks) - answers.keys()
            gone = set(filter(self._is_gone, missing))
            if missing <= gone or time.monotonic() > until:
                break
            store.follow(missing)  # who has answered is not asked again
            time.sleep(POLL)
        silent = {r: self._failure_of(r, "silent", "no heartbeat: dead, stopped or cut off") for r in missing - gone}
        lost = {r: self._failure_of(r, "gone", LOST) for r in gone}
        failures = job_failures(list(answers.values()), silent | lost)
        self._reporter = min(answers)
        self._verdict = {"first": asdict(replace(first_failure(failures), text="")), "reporter": self._reporter}
        self._publish(store)
        return failures

    def _end(self) -> NoReturn:
        """Print the failure report if that falls to this process, and end it, whatever its other threads are doing."""
        store, reporter = self._store, self._reporter
        if reporter == self.runtime.rank:
            print(report(self._failures, str(self.logs)), file=sys.stderr, flush=True)
        if store is not None:
            self._state = "reported"
            self._publish(store)
            ranks = range(self.runtime.ranks) if self._collects else [reporter]
            until = time.monotonic() + GATHER / 2
            while time.monotonic() < until and not store.lost:  # the first to leave makes the launcher end the others
                states = {rank: answer["state"] for rank, answer in self._answers(store, ranks).items()}
                if set(states.values()) == {"reported"} or (
                    self.runtime.rank != 0 and states.get(reporter) == "reported"
                ):
                    break
                store.follow(rank for rank in ranks if states.get(rank) != "reported")
                time.sleep(POLL)
        sys.stdout.flush()
        os._exit(EXIT_FAILED)

    def _publish(self, store: HeartbeatStore) -> None:
        """In the store, and in a file for those who cannot reach it."""
        heartbeat = self._heartbeat()
        store.publish(heartbeat)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            write_json(self._file(self.runtime.rank), heartbeat)
        except OSError:
            logging.getLogger("qatscale").exception("the record of the failure was not written")
        store.flush(wait=1)

    def _answers(self, store: HeartbeatStore, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        """Rank → the heartbeat of each of these that has ended."""
        heartbeats = {rank: store.heartbeats[rank] for rank in ranks}
        unheard = ("training", "ended") if store.lost or store.age > 2 * store.period else ("training",)
        missing = {rank for rank, heartbeat in heartbeats.items() if heartbeat["state"] in unheard}
        if (now := time.monotonic()) > self._looked + 10 * POLL:  # there may be a thousand files
            self._looked = now
            for rank in missing:
                try:
                    heartbeat = json.loads(self._file(rank).read_bytes())
                except (OSError, ValueError):
                    continue
                if heartbeat["job"] == self._job:
                    self._written[rank] = heartbeat
        heartbeats |= {rank: self._written[rank] for rank in missing & self._written.keys()}
        if self.runtime.rank in heartbeats:
            heartbeats[self.runtime.rank] = self._heartbeat()
        return {rank: heartbeat for rank, heartbeat in heartbeats.items() if heartbeat["state"] != "training"}

    def _file(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.failure.json"

    # --- heartbeats and failures ---

    def _heartbeat(self) -> Heartbeat:
        self._count += 1
        frames = _stack(self._waited) or _stack(threading.main_thread().ident)
        return {
            "rank": self.runtime.rank,
            "job": self._job,
            "process": self._process,
            "count": self._count,
            "state": self._state,
            "step": self._step,
            "waits": in_communication([frame.filename for frame in reversed(frames)]),
            "collectives": _collectives() if self._store is not None else 0,
            "failure": asdict(self._own) if self._own else None,
            "seen": asdict(self._seen) if self._seen else None,
            "verdict": self._verdict,
        }

    def _failure_of(self, rank: int, kind: Kind, error: str, text: str = "") -> Failure:
        now, step, host = time.time(), self._step, self._process["host"]
        if self._store is not None:
            now -= self._store.offsets[self.runtime.rank]
            heartbeat = self._store.heartbeats[rank]
            host = heartbeat["process"]["host"]
            step = max(heartbeat["step"], step)  # its heartbeat may be old, and the others do not get past it
        return Failure(rank, host, step, now, kind, error, text[-MAX_TEXT:])

    def _failure_of_self(self, error: BaseException | None) -> Failure:
        if error is not None:
            kind: Kind = "consequence" if self._store is not None and is_consequence(error) else "error"
            kind = "fault" if kind == "error" and fault(error) else kind
            line = fault(error) or traceback.format_exception_only(error)[-1].strip()
            return self._failure_of(self.runtime.rank, kind, line, "".join(traceback.format_exception(error)))
        waited = f"no progress for {time.monotonic() - self._progress:.0f} s"
        stacks = {"The main thread stood at\n": threading.main_thread().ident, "and waited for\n": self._waited}
        text = "".join("".join([title, *traceback.format_list(_stack(at))]) for title, at in stacks.items() if at)
        return self._failure_of(self.runtime.rank, "witness" if self._store is not None else "stalled", waited, text)


def in_communication(files: Sequence[str]) -> bool:
    """Whether a stack, innermost file first, waits for other processes."""
    return any(part in file for file in files[:6] for part in _WAITS)


def _stack(thread: int | None) -> list[traceback.FrameSummary]:
    """A thread's stack, outermost first, without reading any source file; empty where no such thread exists."""
    frame = sys._current_frames().get(thread or 0)
    return traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)[::-1]


def _collectives() -> int:
    """How many collectives this process has entered since its start, over all groups."""
    groups = dist.distributed_c10d._world.pg_map  # the only list of groups there is
    return sum(group._get_sequence_number_for_group() for group in list(groups))  # type: ignore[attr-defined]
