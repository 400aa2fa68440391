"""A notice board beside the training: each process of a job keeps one note on it and reads those of others.

It lives in the store that the process group met through (TCPStore at MASTER_ADDR:MASTER_PORT), over a connection of its
own. A call to a store whose host was cut off may never return, so that a thread does the talking and everybody else
reads what it brought: memory, which always answers.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

Note = dict[str, Any]
_ALARM = "alarm"
_START_TIMEOUT = timedelta(minutes=10)
_CLOCK_ROUNDS = 3


class Board:
    """Collective to make: when it is there, every process has pinned its first note. Each process makes as many boards
    as the others, in the same order."""

    _made = 0

    def __init__(self, rank: int, ranks: int, note: Note, period: float) -> None:
        Board._made += 1
        self.rank, self.ranks, self.period = rank, ranks, period
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store over restarts
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=_START_TIMEOUT, wait_for_workers=False)
        self._store = dist.PrefixStore(f"qatscale/board/{restart}/{Board._made}", store)
        if rank == 0:
            self._store.set(_ALARM, "")
        self._store.set(f"{rank}", json.dumps(note))
        self.offsets = self._compare_clocks()
        """Rank → seconds that its clock is ahead of rank 0's."""
        self.notes: dict[int, Note] = {}
        """The notes as last read; of all processes after the start and since an alarm, else of `follow`."""
        self.alarm = False
        """Somebody raised the alarm."""
        self.lost = ""
        """Why the board is out of reach for good."""
        self._own, self._raise = json.dumps(note), False
        self._follow: tuple[int, ...] = ()
        self._read(range(ranks))
        self._last_round = time.monotonic()
        self._wake, self._done_round, self._closed = threading.Event(), threading.Event(), False
        threading.Thread(target=self._talk, name="board", daemon=True).start()

    def _compare_clocks(self) -> dict[int, float]:
        """All processes read their clocks when rank 0 gives the word; of some rounds the smallest difference counts,
        for a busy machine wakes a process late, never early."""
        store = self._store
        for turn in range(_CLOCK_ROUNDS):
            if self.rank == 0:
                while store.add(f"clock/ready/{turn}", 0) < self.ranks - 1:
                    time.sleep(0.002)
                store.set(f"clock/go/{turn}", "")
            else:
                store.add(f"clock/ready/{turn}", 1)
                store.wait([f"clock/go/{turn}"])
            store.set(f"clock/at/{turn}/{self.rank}", repr(time.time()))
        offsets: dict[int, float] = {}
        for turn in range(_CLOCK_ROUNDS):
            times = [float(t) for t in store.multi_get([f"clock/at/{turn}/{rank}" for rank in range(self.ranks)])]
            for rank, at in enumerate(times):
                offsets[rank] = min(at - times[0], offsets.get(rank, at - times[0]), key=abs)
        return offsets

    @property
    def age(self) -> float:
        """Seconds since the board last answered."""
        return time.monotonic() - self._last_round

    def follow(self, ranks: Iterable[int]) -> None:
        """Whose notes each round reads."""
        self._follow = tuple(ranks)

    def pin(self, note: Note) -> None:
        """Replace the own note; sent within a period."""
        self._own = json.dumps(note)

    def raise_alarm(self) -> None:
        self._raise = True
        self.hurry()

    def hurry(self, wait: float = 0.0) -> None:
        """Talk now; with `wait`, return when a whole round is done, or after that many seconds."""
        for _ in range(2 if wait else 1):  # the round that is under way may have begun before the note was pinned
            self._done_round.clear()
            self._wake.set()
            if wait:
                self._done_round.wait(wait / 2)

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _talk(self) -> None:
        while not self._closed:
            try:
                self._round()
            except Exception as error:  # DistNetworkError, DistStoreError, RuntimeError: by version and by moment
                self.lost = f"{type(error).__name__}: {error}"
                self._done_round.set()
                return
            self._last_round = time.monotonic()
            self._done_round.set()
            self._wake.wait(0.2 if self.alarm else self.period)
            self._wake.clear()

    def _round(self) -> None:
        self._store.set(f"{self.rank}", self._own)
        if self._raise:
            self._store.set(_ALARM, "raised")
        self._read(range(self.ranks) if self.alarm else self._follow)

    def _read(self, ranks: Iterable[int]) -> None:
        wanted = list(ranks)
        alarm, *notes = self._store.multi_get([_ALARM, *map(str, wanted)])
        self.notes = {**self.notes, **{rank: json.loads(note) for rank, note in zip(wanted, notes, strict=True)}}
        self.alarm = bool(alarm)
