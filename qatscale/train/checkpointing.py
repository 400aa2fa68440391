"""The checkpoints of a run in training, written beside its steps.

The loop pauses while the masters and Adam's state are copied to host memory. A thread writes the copy, waits for the
writers of the other processes (through the job's store), commits the checkpoint and rotates. Write errors are
re-raised in the training loop. A checkpoint is reported only once it is durable on disk.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Manifest as DataManifest
from qatscale.engine.agreement import Agreement
from qatscale.engine.checkpoints.files import rotate
from qatscale.engine.checkpoints.manifest import Manifest
from qatscale.engine.checkpoints.save import extremes_of_copies, parameter_records, slices_of, write_checkpoint
from qatscale.supervise.failure_report import is_consequence
from qatscale.supervise.watchdog import Watchdog
from qatscale.train.components import TrainingComponents

NICE = 10
"""Priority of the writing thread. Where the CPU also computes the steps, hashing and copying into the page cache would
otherwise take half of it from them."""
NOTICEABLE = 0.1
"""Seconds of waiting that are reported."""
PATIENCE_AFTER_ERROR = 600.0
"""Seconds that a run which has failed waits for the checkpoint in flight."""


class HostCopy:
    """A copy in host memory of what this process holds, from which a checkpoint is written while training continues.

    One buffer as large as all slices, made once and used for every checkpoint: 12 bytes per parameter, over all
    processes. Its pages are mapped at the start, so that a copy costs no more than a copy, and a machine that lacks the
    memory says so before the first step.
    """

    def __init__(self, slices: Mapping[str, Tensor]) -> None:
        self._buffer = torch.empty(sum(s.numel() for s in slices.values())).zero_()
        self._copied: torch.cuda.Event | None = None
        self._pinned = any(s.is_cuda for s in slices.values())
        if self._pinned:
            # torch's own pinned memory has sizes of powers of two: up to twice as much.
            code = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), self._buffer.nbytes, 0)
            if int(code):
                size = f"{self._buffer.nbytes / 2**30:.1f} GiB"
                raise MemoryError(f"{size} of host memory could not be pinned ({code}); see checkpoint.background")

    @torch.no_grad()
    def take(self, slices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the slices, the same in every call, and return the copies under the same names.

        From a GPU the copies are queued in its current stream: later kernels wait for them, this thread does not. The
        copies are complete after `wait`.
        """
        assert sum(s.numel() for s in slices.values()) == self._buffer.numel()
        copies = dict(zip(slices, self._buffer.split([s.numel() for s in slices.values()]), strict=True))
        for name, values in slices.items():
            copies[name].copy_(values, non_blocking=self._pinned)
        if self._pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Until the last `take` is done. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        """Unpin. No thread may still write from it."""
        if self._pinned:
            self.wait()
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
            self._pinned = False


class _Flight(threading.Thread):
    def __init__(self, draft: Manifest, write: Callable[[], Path], device: torch.device) -> None:
        super().__init__(name=f"checkpoint of step {draft.step}", daemon=True)
        self.draft, self._write, self._device = draft, write, device
        self.path: Path | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            if self._device.type == "cuda":  # a thread begins on GPU 0, and would make a context there
                torch.cuda.set_device(self._device)
            if sys.platform == "linux":  # elsewhere priorities are those of processes
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            self.path = self._write()
        except BaseException as error:  # re-raised where the loop looks
            self.error = error


class AsyncCheckpointer:
    """A context around the steps. Collective to make, to call and to leave without an error.

    With `config.checkpoint.background` false, a save returns when the checkpoint is on disk, and no copy is made.
    """

    def __init__(
        self,
        checkpoints: Path,
        config: RunConfig,
        components: TrainingComponents,
        watchdog: Watchdog,
        *,
        recipe_hash: str,
        data: DataManifest,
        saved: Callable[[Manifest, Path], None],
        notice: Callable[[str], None],
    ) -> None:
        """recipe_hash: rank 0's counts. data: that of the training tokens.

        saved: called once for each checkpoint that is complete. notice: called with what a person should know. Both are
        called by the thread that calls `save`, `poll` or `wait`.
        """
        self.checkpoints, self._config, self._components = checkpoints, config, components
        self._watchdog, self._saved, self._notice = watchdog, saved, notice
        self._recipe_hash, self._data = recipe_hash, data
        self._agreement = Agreement(components.runtime)
        self._copy = HostCopy(slices_of(components.masters)) if config.checkpoint.background else None
        self._flight: _Flight | None = None

    def save(self, step: int, reason: str) -> None:
        """Save the state after `step` steps. Returns when the masters may change.

        Waits for the checkpoint before, if that is still being written. reason: see `Manifest.reason`.
        """
        if self._flight is not None and self._flight.is_alive():
            before, began = self._flight.draft.step, time.perf_counter()
            self.wait()
            if (waited := time.perf_counter() - began) >= NOTICEABLE:
                self._notice(
                    f"note: the checkpoint of step {step} had to wait {waited:.1f} s, and training with it, until that "
                    f"of step {before} was on disk"
                )
        self.poll()
        config, components = self._config, self._components
        slices, copied = slices_of(components.masters), extremes_of_copies(components.masters)
        draft = Manifest(
            step=step, tokens=step * config.tokens_per_step, reason=reason, kept=reason in ("boundary", "end"),
            recipe_hash=self._recipe_hash, data=self._data.fingerprint, tokenizer=self._data.tokenizer.fingerprint,
            plugin=components.plugin.state(), spikes=replace(components.guard.state),
            parameters=parameter_records(components.masters),
            layout={
                "processes": components.runtime.ranks,
                "zero_stage": components.masters.stage,
                **asdict(components.topology.layout),
            },
        )  # fmt: skip
        if self._copy is None:
            self._saved(draft, self._write(draft, slices, copied))
            return
        copies, copy = self._copy.take(slices), self._copy

        def write() -> Path:
            copy.wait()
            return self._write(draft, copies, copied)

        self._flight = _Flight(draft, write, components.runtime.device)
        self._flight.start()

    def _write(self, draft: Manifest, slices: dict[str, Tensor], copied: dict[str, Tensor]) -> Path:
        runtime = self._components.runtime
        path = write_checkpoint(self.checkpoints, draft, slices, runtime, self._agreement, copied)
        if runtime.is_main:
            rotate(self.checkpoints, self._config.checkpoint.keep)
        return path

    def poll(self) -> None:
        """Report a checkpoint that is complete by now, or raise the error of its writing. Call it after every step."""
        if self._flight is not None and not self._flight.is_alive():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the checkpoint in flight, at most so many seconds, then do as `poll`."""
        flight = self._flight
        if flight is None:
            return
        with self._watchdog.waiting_for(flight.ident):
            flight.join(seconds)
        if flight.is_alive():
            return
        self._flight = None
        if flight.error is not None:
            raise flight.error
        assert flight.path is not None
        self._saved(flight.draft, flight.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Wait for the checkpoint in flight: it holds a good state, whatever error the loop has met since.

        Not where another process has failed, because that one takes part in writing it.
        """
        if error is not None:
            if not is_consequence(error):
                try:
                    self.wait(PATIENCE_AFTER_ERROR)
                except Exception:  # the loop's error is the one to report
                    logging.getLogger("qatscale").exception("the checkpoint in flight")
            return
        self.wait()
        if self._copy is not None:
            self._copy.close()
