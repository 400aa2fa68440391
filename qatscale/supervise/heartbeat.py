"""Heartbeats: each process of a job publishes a small record of itself every few seconds and reads those of others.

They live in the store that the process group met through (TCPStore at MASTER_ADDR:MASTER_PORT), over a connection of
its own. A call to a store whose host was cut off may never return. So one thread talks to the store, and everybody else
reads what it brought into memory.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from qatscale.engine.agreement import job_store

Heartbeat = dict[str, Any]
_ALARM = "alarm"
_START_TIMEOUT = timedelta(minutes=10)
_CLOCK_ROUNDS = 3


class HeartbeatStore:
    """Collective to make: afterwards every process has published its first heartbeat.

    Each process makes as many stores as the others, in the same order.
    """

    _made = 0

    def __init__(self, rank: int, ranks: int, heartbeat: Heartbeat, period: float) -> None:
        """period: seconds between two heartbeats."""
        type(self)._made += 1
        self.rank, self.ranks, self.period = rank, ranks, period
        self._store = job_store(f"heartbeats/{type(self)._made}", _START_TIMEOUT)
        if rank == 0:
            self._store.set(_ALARM, "")
        self._store.set(f"{rank}", json.dumps(heartbeat))
        met = self._meet(range(ranks))
        self.offsets: dict[int, float] = dict(enumerate(met["offsets"]))
        """Rank → seconds that its clock is ahead of rank 0's."""
        self.heartbeats: dict[int, Heartbeat] = dict(enumerate(met["heartbeats"]))
        """As last read: those of all processes at the start, and then those of `follow`."""
        self.alarm = False
        """Some process raised the alarm."""
        self.lost = ""
        """Why the store is out of reach for good."""
        self._own, self._raise = json.dumps(heartbeat), False
        self._follow: tuple[int, ...] = ()
        self._last_round = time.monotonic()
        self._wake, self._done_round, self._closed = threading.Event(), threading.Event(), False
        threading.Thread(target=self._talk, name="heartbeat", daemon=True).start()

    def _meet(self, ranks: Sequence[int]) -> dict[str, Any]:
        """The first heartbeats of all processes and the offsets of their clocks: rank 0 reads them, all others it.

        For the clocks all processes read theirs when rank 0 gives the signal. The smallest difference of some rounds
        counts: a busy machine wakes a process late, never early.
        """
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
        if self.rank == 0:
            offsets: dict[int, float] = {}
            for turn in range(_CLOCK_ROUNDS):
                times = [float(t) for t in store.multi_get([f"clock/at/{turn}/{rank}" for rank in ranks])]
                for rank, at in enumerate(times):
                    offsets[rank] = min(at - times[0], offsets.get(rank, at - times[0]), key=abs)
            heartbeats = [json.loads(text) for text in store.multi_get([f"{rank}" for rank in ranks])]
            met = json.dumps({"heartbeats": heartbeats, "offsets": [offsets[rank] for rank in ranks]})
            store.set("met", zlib.compress(met.encode()))  # type: ignore[arg-type] # it takes bytes
        found: dict[str, Any] = json.loads(zlib.decompress(store.get("met")))
        return found

    @property
    def age(self) -> float:
        """Seconds since the store last answered."""
        return time.monotonic() - self._last_round

    def follow(self, ranks: Iterable[int]) -> None:
        """Set whose heartbeats each round reads."""
        self._follow = tuple(ranks)

    def publish(self, heartbeat: Heartbeat) -> None:
        """Replace this process's heartbeat; it is sent within a period."""
        self._own = json.dumps(heartbeat)

    def raise_alarm(self) -> None:
        self._raise = True
        self.flush()

    def flush(self, wait: float = 0.0) -> None:
        """Talk to the store now; with `wait`, return after one complete round or after that many seconds."""
        for _ in range(2 if wait else 1):  # the current round may have begun before the heartbeat was published
            self._done_round.clear()
            self._wake.set()
            if wait:
                self._done_round.wait(wait / 2)

    def forgive(self, seconds: float) -> None:
        """This process was paused for so long: the store was not asked in that time."""
        self._last_round += seconds

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
        wanted = list(self._follow)
        alarm, *read = self._store.multi_get([_ALARM, *map(str, wanted)])
        self.heartbeats = self.heartbeats | {rank: json.loads(text) for rank, text in zip(wanted, read, strict=True)}
        self.alarm = bool(alarm)
