"""Agreement of a job's processes through the store that they met in, without a process group.

A group of gloo opens a socket between any two of its processes, 1,023 a process in a job of 1,024. NCCL's groups work
on the device alone. Here each process has one connection to the store's host.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from qatscale.engine.runtime import Runtime, outcome_of, results_of


def job_store(name: str, timeout: timedelta) -> dist.Store:
    """A part of the store that the job's processes met in (TCPStore at MASTER_ADDR:MASTER_PORT), over a connection of
    its own, which one thread at a time may use. timeout: of each call."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store over restarts
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"qatscale/{restart}/{name}", store)


class Agreement:
    """What a job's processes agree on through its store. A process group would open a socket between any two of them.

    Collective to make and to use; one thread at a time. It waits as long as it takes: a hang is the watchdog's to see.
    """

    _made = 0
    _VOTE = 1 << 32

    def __init__(self, runtime: Runtime) -> None:
        """Each process makes as many as the others, in the same order."""
        type(self)._made += 1
        self._runtime, self._turn, self._votes = runtime, 0, 0
        if runtime.ranks > 1:
            self._store = job_store(f"agreement/{type(self)._made}", timedelta(days=1))

    def gather(self, work: Callable[[], Any] | None) -> list[Any]:
        """As `together`, but the results come to rank 0 alone, and the others get none."""
        own, ranks, turn = outcome_of(work, self._runtime), self._runtime.ranks, self._turn
        if ranks == 1:
            return results_of([own])
        self._turn += 1
        if not self._runtime.is_main:
            self._store.set(f"{turn}/{self._runtime.rank}", pickle.dumps(own))  # type: ignore[arg-type]
            results_of([pickle.loads(self._store.get(f"{turn}/answer"))])
            return []
        keys = [f"{turn}/{rank}" for rank in range(1, ranks)]
        outcomes = [own, *map(pickle.loads, self._store.multi_get(keys))]
        for key in keys:
            self._store.delete_key(key)
        error: Exception | None = None
        try:
            return results_of(outcomes)
        except Exception as found:
            error = found
            raise
        finally:
            self._store.set(f"{turn}/answer", pickle.dumps((None, error)))  # type: ignore[arg-type]
            self._store.delete_key(f"{turn - 1}/answer")  # everybody has read it

    def vote(self, number: int) -> None:
        """Give a number, 0 for none, and wait for nobody."""
        self._votes += 1
        if self._runtime.ranks == 1:
            self._own = number
            return
        key = f"vote/{self._votes}"
        if number:
            self._store.set("number", str(number))
        counted = self._store.add(key, 1 + bool(number) * self._VOTE)
        if counted % self._VOTE == self._runtime.ranks:  # the last one says what all have given
            number = int(self._store.get("number")) if counted >= self._VOTE else 0
            self._store.set(f"{key}/all", str(number))
            for old in (key, f"vote/{self._votes - 1}/all"):  # read before each vote of now
                self._store.delete_key(old)

    def voted(self) -> int:
        """The number that some process gave in the last vote, the same on all; 0 = none. Waits for all votes."""
        if not self._votes:
            return 0
        return self._own if self._runtime.ranks == 1 else int(self._store.get(f"vote/{self._votes}/all"))
