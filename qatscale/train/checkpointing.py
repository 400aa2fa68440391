"""The checkpoints of a run in training, written beside its steps.

The loop stands still while the masters and Adam's state are copied to host memory. A thread writes the copy, agrees
with those of the other processes that all have (over a group of their own), commits the checkpoint and rotates. What
goes wrong there is raised in the loop; that a checkpoint is there is told when it is on the disk and not before.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch import Tensor

from qatscale.engine.checkpoints.files import Manifest, rotate
from qatscale.engine.checkpoints.host_copy import HostCopy
from qatscale.engine.checkpoints.save_load import slices_of, write_checkpoint
from qatscale.engine.runtime import Runtime
from qatscale.engine.zero_masters import ZeroMasters
from qatscale.supervise.failure_report import is_consequence

_TIMEOUT = timedelta(days=1)
"""Of the group: processes wait for the slowest writer. The watch knows sooner who hangs."""
NICE = 10
"""Of the thread that writes. Where the CPU computes the steps too, hashing and copying into the page cache would
else take half of it from them."""
WORTH_TELLING = 0.1
"""Seconds."""
LAST_PATIENCE = 600.0
"""Seconds that a run which has failed waits for the checkpoint in flight."""


class _Flight(threading.Thread):
    """A checkpoint on its way."""

    def __init__(self, draft: Manifest, write: Callable[[], Path]) -> None:
        super().__init__(name=f"checkpoint of step {draft.step}", daemon=True)
        self.draft, self._write = draft, write
        self.path: Path | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            if sys.platform == "linux":  # elsewhere priorities are those of processes
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            self.path = self._write()
        except BaseException as error:  # raised where the loop looks
            self.error = error


class Saver:
    """A context around the steps. Collective to make, to call and to leave without an error.

    background: False = a save returns when the checkpoint is on disk, and no copy is made. keep: see `rotate`.
    saved: called once for each checkpoint that is complete; notice: with what a person should know. Both are called in
    the thread that calls `save`, `poll` or `wait`.
    """

    def __init__(
        self,
        checkpoints: Path,
        masters: ZeroMasters,
        runtime: Runtime,
        *,
        background: bool,
        keep: int,
        saved: Callable[[Manifest, Path], None],
        notice: Callable[[str], None],
    ) -> None:
        self.checkpoints, self.masters, self.runtime, self.keep = checkpoints, masters, runtime, keep
        self._saved, self._notice = saved, notice
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if runtime.ranks > 1 else None
        self._copy = HostCopy(slices_of(masters)) if background else None
        self._flight: _Flight | None = None
        self._waiting = False

    def save(self, draft: Manifest) -> None:
        """Save what the masters hold now. Returns when they may change; waits for the checkpoint before, if need be."""
        if self._flight is not None and self._flight.is_alive():
            before, began = self._flight.draft.step, time.perf_counter()
            self.wait()
            if (waited := time.perf_counter() - began) >= WORTH_TELLING:
                self._notice(
                    f"note: the checkpoint of step {draft.step} had to wait {waited:.1f} s, and training with it, "
                    f"until that of step {before} was on disk"
                )
        self.poll()
        slices = slices_of(self.masters)
        if self._copy is None:
            self._saved(draft, self._write(draft, slices))
            return
        copies, copy = self._copy.take(slices), self._copy

        def write() -> Path:
            copy.wait()
            return self._write(draft, copies)

        self._flight = _Flight(draft, write)
        self._flight.start()

    def _write(self, draft: Manifest, slices: dict[str, Tensor]) -> Path:
        path = write_checkpoint(self.checkpoints, draft, slices, self.runtime, self._group)
        if self.runtime.is_main:
            rotate(self.checkpoints, self.keep)
        return path

    def poll(self) -> None:
        """Call it after every step: tells of a checkpoint that is complete by now, raises what its writing met."""
        if self._flight is not None and not self._flight.is_alive():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """As `poll`, when the checkpoint in flight has landed, or after so many seconds."""
        flight = self._flight
        if flight is None:
            return
        self._waiting = True
        try:
            flight.join(seconds)
        finally:
            self._waiting = False
        if flight.is_alive():
            return
        self._flight = None
        if flight.error is not None:
            raise flight.error
        assert flight.path is not None
        self._saved(flight.draft, flight.path)

    def waited_for(self) -> int | None:
        """The thread that the loop waits for at this moment; None: it does not. From any thread."""
        flight = self._flight
        return flight.ident if flight is not None and self._waiting else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is in flight is a good state, whatever the loop has met since: it is waited for. Not where another
        process has failed, which takes part in writing it."""
        if error is not None:
            if not is_consequence(error):
                try:
                    self.wait(LAST_PATIENCE)
                except Exception:  # the loop's error is the one to tell
                    logging.getLogger("qatscale").exception("the checkpoint in flight")
            return
        self.wait()
        if self._copy is not None:
            self._copy.close()
        if self._group is not None:
            dist.destroy_process_group(self._group)
