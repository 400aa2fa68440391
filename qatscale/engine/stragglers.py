"""How long each process computes by itself, and which one keeps the others waiting.

Processes that train together take equally long for a step: the faster ones wait in the next exchange. So what counts is
timed where no process waits for another. Under ZeRO-1 and 2 that is the forward pass. Under ZeRO-3, tensor parallelism
and pipelines the forward pass exchanges too, and the core of attention is timed, which has no weights and exchanges
nothing. The time spent on reading batches is added.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from qatscale.model.llama import Attention, Llama

FACTOR = 1.2
"""Times the median from which a process counts as slow."""
INTERVALS = 5
"""Logging intervals in a row after which a slow process is reported."""


class Stopwatch:
    """Takes the time of the passages that it is put around, on a GPU by the GPU's clock; only while it is `on`."""

    def __init__(self, device: torch.device, passages: float) -> None:
        """passages: those of a step on an average process. Stages of a pipeline may have more or fewer."""
        self.on = False
        self._on_gpu, self._per_step = device.type == "cuda", passages
        self._seconds, self._count = 0.0, 0
        self._passages: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.on and self._on_gpu else []
        if events:
            events[0].record()
        yield
        self._count += self.on
        if events:
            events[1].record()
            self._passages.append((events[0], events[1]))
        elif self.on:
            self._seconds += time.perf_counter() - start

    def read(self) -> float | None:
        """Seconds that a step takes by the passages since the last call; None without one. Waits for the GPU."""
        for first, last in self._passages:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        mean = self._seconds / self._count if self._count else None
        self.on, self._seconds, self._count, self._passages = False, 0.0, 0, []
        return None if mean is None else mean * self._per_step


def time_attention(model: Llama, stopwatch: Stopwatch) -> None:
    """Put the stopwatch around the core of attention in every block of this process."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.timed = stopwatch


class Stragglers:
    """Notices a process that is slow in several logging intervals in a row."""

    def __init__(self) -> None:
        self._slow, self._intervals = -1, 0

    def add(self, seconds: Sequence[float]) -> tuple[dict[str, float], int | None]:
        """seconds: of each rank, per step. Returns the numbers for the record, and a rank to report now."""
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        median = statistics.median_low(seconds)
        if seconds[slowest] <= FACTOR * median:
            self._slow, self._intervals = -1, 0
        elif slowest == self._slow:
            self._intervals += 1
        else:
            self._slow, self._intervals = slowest, 1
        record = {"slowest_rank": slowest, "slowest_seconds": seconds[slowest], "median_seconds": median}
        return record, slowest if self._intervals == INTERVALS else None
