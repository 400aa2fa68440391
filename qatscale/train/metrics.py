"""The metrics record of a logging interval: loss, speed, arithmetic, memory, quantizers, time spent on data."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist

from qatscale.config.schema import RunConfig
from qatscale.config.sizes import flops_per_token, peak_flops
from qatscale.engine.runtime import Runtime
from qatscale.schedule.timeline import StepSettings

WARMUP_STEPS = 10
"""Steps after a start or the switch that no speed counts: compilation, first allocations, cold caches."""
SLOW = 1.2
"""Times the median from which a process counts as slow."""
SLOW_INTERVALS = 5
"""Logging intervals in a row after which a slow process is reported."""


def total_peak(device_name: str, devices: int, precision: Literal["fp32", "bf16"]) -> float | None:
    """Peak FLOP/s of the devices in this precision; None where it is not known: no MFU is better than a wrong one.

    The table holds the peaks of bf16 matrix units, which fp32 arithmetic does not use.
    """
    peak = peak_flops(device_name) if precision == "bf16" else None
    return peak * devices if peak else None


class Meter:
    """Collects over a logging interval without waiting for the device; `read` gives the record and starts anew."""

    def __init__(self, config: RunConfig, runtime: Runtime, precision: Literal["fp32", "bf16"]) -> None:
        self._runtime = runtime
        self._tokens_per_step = config.tokens_per_step
        self._flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self._peak = total_peak(runtime.device_name, runtime.ranks, precision)
        self._since_cold = 0
        self._stragglers = Stragglers()
        self.straggler: int | None = None
        """The rank that the last record shows to keep the others waiting for long enough."""
        self._start_interval()

    def _start_interval(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        self._step_losses: list[torch.Tensor] = []
        self._micro_batches = 0
        self._steps = 0
        self._data_seconds = 0.0
        self._paused = 0.0
        self._warmup = self._since_cold < WARMUP_STEPS
        self._started = time.perf_counter()

    def add_loss(self, loss: torch.Tensor) -> None:
        """The mean loss of one micro-batch on this process."""
        self._step_losses.append(loss.detach())

    def end_step(self, *, updated: bool = True) -> None:
        """updated: False leaves the loss of the step out, whose update was withheld."""
        if updated:
            for loss in self._step_losses:
                self._loss += loss
            self._micro_batches += len(self._step_losses)
        self._step_losses.clear()
        self._steps += 1
        self._since_cold += 1

    @contextmanager
    def data(self) -> Iterator[None]:
        """A context whose time was spent on reading the batch."""
        start = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - start

    def restart(self) -> None:
        """Start an empty interval anew, after a switch: its time does not count, and warm-up begins again."""
        assert self._steps == 0, "a segment ends with a metrics record"
        self._wait()
        self._since_cold = 0
        self._start_interval()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time is not training: checkpoints, validation. It waits for the device on both sides."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self._paused += time.perf_counter() - start

    def _wait(self) -> None:
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)

    def read(
        self,
        step: int,
        settings: StepSettings,
        engine: Any,
        qat_counts: torch.Tensor | None = None,
        own_seconds: float | None = None,
    ) -> dict[str, Any]:
        """The interval's record after `step` steps. Collective.

        `loss` is the mean over all tokens of the interval's `steps` on all processes. All but the loss and the speeds
        describe the last step. `warmup` marks an interval that began before WARMUP_STEPS were done, which final speeds
        leave out. FloatingPointError where the loss is not finite: all later numbers would be noise.

        qat_counts: `QatMetrics.counts`, in QAT. They add `scales_floored`, the share of scales at or under the floor,
        and `code_flips`, the share of quantized weights whose code changed in the interval's last step. A signal that
        ends an interval early leaves the second out.

        own_seconds: what the `Stopwatch` of the last step shows, if it was on. It adds `slowest_rank`,
        `slowest_seconds` and `median_seconds`, of a step.
        """
        parts = [self._loss.view(1), *([] if qat_counts is None else [qat_counts])]
        if own_seconds is not None:  # each process's place in the sum that is made anyway
            own = self._loss.new_zeros(self._runtime.ranks)
            own[self._runtime.rank] = own_seconds + self._data_seconds / self._steps
            parts.append(own)
        sums = torch.cat(parts)
        if self._runtime.ranks > 1:
            dist.all_reduce(sums)
        total, *counts = sums.tolist()  # waits for the device
        seconds_of_ranks = [counts.pop() for _ in parts[-1]][::-1] if own_seconds is not None else []
        loss = total / (self._micro_batches * self._runtime.ranks) if self._micro_batches else math.nan
        if self._micro_batches and not math.isfinite(loss):
            problem = f"the loss is {loss} in the {self._steps} steps up to step {step}"
            fix = "Lower optimizer.learning_rate, or clip more (optimizer.gradient_clipping), in a new run or a branch."
            raise FloatingPointError(f"{problem}. {fix}")
        seconds = time.perf_counter() - self._started - self._paused
        tokens_per_second = self._steps * self._tokens_per_step / seconds
        flops = tokens_per_second * self._flops_per_token
        record = {
            "tokens": step * self._tokens_per_step,
            "steps": self._steps,
            "phase": settings.phase,
            "loss": loss,
            "learning_rate": settings.learning_rate,
            "grad_norm": float(engine.get_global_grad_norm()),
            "tokens_per_second": tokens_per_second,
            "tflops": flops / 1e12,
            "mfu": flops / self._peak if self._peak else None,
            "memory_gib": self._runtime.memory_gib(),
            "data_seconds": self._data_seconds,
            "warmup": self._warmup,
        }
        if counts:
            floored, scales, flipped, compared = counts
            record["scales_floored"] = floored / scales
            if compared:
                record["code_flips"] = flipped / compared
        self.straggler = None
        if seconds_of_ranks and not self._warmup:
            shown, self.straggler = self._stragglers.add(seconds_of_ranks)
            record |= shown
        self._start_interval()
        return record


_NOTHING = nullcontext()


class Stopwatch:
    """Takes the time of the passages that it is put around, on a GPU by the GPU's clock; only while it is `on`.

    All processes take equally long for a step: the faster ones wait in the next exchange. What counts is the time of
    passages in which none waits. Under ZeRO-1 and 2 these are the forward passes, in pipelines the blocks of a stage.
    Under ZeRO-3 and tensor parallelism blocks exchange too, and the core of attention is timed, which has no weights.
    """

    def __init__(self, device: torch.device, passages: float) -> None:
        """passages: those of a step on an average process. Stages of a pipeline may have more or fewer."""
        self.on = False
        self._on_gpu, self._per_step = device.type == "cuda", passages
        self._seconds, self._count = 0.0, 0
        self._passages: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self) -> AbstractContextManager[None]:
        return self._passage() if self.on else _NOTHING

    def around(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`function`, each of whose calls is a passage."""

        def timed(*given: Any) -> torch.Tensor:
            with self():
                return function(*given)

        return timed

    @contextmanager
    def _passage(self) -> Iterator[None]:
        start = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._on_gpu else []
        if events:
            events[0].record()
        yield
        self._count += 1
        if events:
            events[1].record()
            self._passages.append((events[0], events[1]))
        else:
            self._seconds += time.perf_counter() - start

    def read(self) -> float | None:
        """Seconds that a step takes by the passages since the last call; None without one. Waits for the GPU."""
        for first, last in self._passages:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        mean = self._seconds / self._count if self._count else None
        self.on, self._seconds, self._count, self._passages = False, 0.0, 0, []
        return None if mean is None else mean * self._per_step


class Stragglers:
    """Notices a process that is slow in several logging intervals in a row."""

    def __init__(self) -> None:
        self._slow, self._intervals = -1, 0

    def add(self, seconds: Sequence[float]) -> tuple[dict[str, float], int | None]:
        """seconds: of each rank, per step. Returns the numbers for the record, and a rank to report now."""
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        median = statistics.median_low(seconds)
        if seconds[slowest] <= SLOW * median:
            self._slow, self._intervals = -1, 0
        elif slowest == self._slow:
            self._intervals += 1
        else:
            self._slow, self._intervals = slowest, 1
        record = {"slowest_rank": slowest, "slowest_seconds": seconds[slowest], "median_seconds": median}
        return record, slowest if self._intervals == SLOW_INTERVALS else None
