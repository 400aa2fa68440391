"""SIGTERM and SIGUSR1 (pre-emption): finish the step, save, leave with an exit code that says "start me again"."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from qatscale.engine.runtime import Runtime


class StopRequest:
    """Whether any process was asked to stop, agreed upon by all at the same step. A context.

    A signal may reach one process only, and not at the same step. So every step starts an all-reduce of one number
    over a CPU group and reads that of the step before: all processes read the same, and none waits for it.
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
        """Call once after every step on every process: the signal's number once all know of it, else 0."""
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
        """Give the signals back to whoever had them. After an error they stay as they are: the launcher ends processes
        with SIGTERM when one has failed, and the error has yet to be told; and the others may never come to this."""
        if kind is not None and self._group is not None:
            return
        if self._pending is not None:
            self._pending[1].wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)  # its threads, beside NCCL; see `runtime._leave`
        for number, handler in self._before.items():
            signal.signal(number, handler)
