"""SIGTERM and SIGUSR1 (pre-emption): finish the step, save, and exit with a code that asks to be started again."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from qatscale.engine.runtime import Runtime


class StopRequest:
    """A context in which all processes agree, at the same step, whether any of them was asked to stop.

    A signal may reach one process only, or several at different steps. So every step starts an all-reduce of one number
    over a CPU group and reads the result of the step before: all processes read the same, and none waits for it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, runtime: Runtime) -> None:
        self.received: int = 0
        """The number of the first signal this process got, or 0."""
        self._group = dist.new_group(backend="gloo") if runtime.ranks > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._before = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the handler's signature
        self.received = self.received or number

    def agreed(self) -> int:
        """The signal's number once all processes know of it, else 0. Call it once after every step on every process."""
        if self._group is None:
            return self.received
        agreed = 0
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            agreed = int(flag)
        flag = torch.tensor(self.received)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = flag, work
        return agreed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restore the signal handlers. After an error they stay: the launcher ends processes with SIGTERM when one has
        failed, and the error has yet to be reported; and the other processes may never reach this point."""
        if kind is not None and self._group is not None:
            return
        if self._pending is not None:
            self._pending[1].wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)  # its threads, beside NCCL; see `runtime._leave`
        for number, handler in self._before.items():
            signal.signal(number, handler)
