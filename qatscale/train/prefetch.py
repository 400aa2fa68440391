"""The batches of the coming steps, read while the present one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

AHEAD = 2
"""Batches that wait at most: one hides the reading of a batch, a second one its hesitations."""


class Prefetch:
    """Steps first … end - 1 in order, read by a thread. A context: leaving it ends the thread.

    A batch is a function of its step alone, so that what was read ahead and not used is simply read again by the run
    that resumes. What reading raises is raised by `take`.
    """

    def __init__(self, read: Callable[[int], np.ndarray], first: int, end: int, *, pin: bool) -> None:
        """`pin`: into page-locked memory, from which a GPU copies while the host goes on."""
        self._read, self._steps, self._pin = read, range(first, end), pin
        self._ready: queue.Queue[tuple[int, Tensor | BaseException]] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def take(self, step: int) -> Tensor:
        """The batch of the next step."""
        found, batch = self._ready.get()
        if isinstance(batch, BaseException):
            raise batch
        assert found == step, f"asked for step {step} where {found} is next"
        return batch

    def _run(self) -> None:
        for step in self._steps:
            try:
                batch = torch.from_numpy(self._read(step))
                item: Tensor | BaseException = batch.pin_memory() if self._pin else batch
            except BaseException as error:  # whatever it is belongs to the loop
                item = error
            while not self._closed.is_set():
                try:
                    self._ready.put((step, item), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, BaseException):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(timeout=10)  # a read that hangs in a network file system must not keep an error from leaving
