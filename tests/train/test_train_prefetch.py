"""Batches read ahead, and garbage collected when the loop says so."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from qatscale.train.garbage import EVERY, Garbage
from qatscale.train.prefetch import AHEAD, Prefetch


def batch(step: int) -> np.ndarray:
    return np.full((2, 3), step, np.int64)


def test_every_step_gets_its_own_batch_and_few_are_read_ahead() -> None:
    read: list[int] = []
    with Prefetch(lambda step: (read.append(step), batch(step))[1], 5, 40, pin=False) as upcoming:
        for step in range(5, 40):
            assert upcoming.take(step).tolist() == batch(step).tolist()
            assert len(read) <= step - 5 + 1 + AHEAD + 1
    assert read == list(range(5, 40))


def test_reading_is_hidden_behind_the_step() -> None:
    """20 batches of 10 ms beside 20 steps of 10 ms take about as long as one of the two."""
    with Prefetch(lambda step: (time.sleep(0.01), batch(step))[1], 0, 20, pin=False) as upcoming:
        waited = 0.0
        for step in range(20):
            began = time.perf_counter()
            upcoming.take(step)
            waited += time.perf_counter() - began
            time.sleep(0.015)
    assert waited < 0.1, "of 0.2 s of reading"


def test_an_error_of_the_thread_is_raised_at_its_step() -> None:
    def read(step: int) -> np.ndarray:
        if step == 2:
            raise OSError("the disk is gone")
        return batch(step)

    with Prefetch(read, 0, 10, pin=False) as upcoming:
        for step in range(2):
            upcoming.take(step)
        with pytest.raises(OSError, match="the disk is gone"):
            upcoming.take(2)
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_leaving_early_ends_the_thread() -> None:
    with Prefetch(batch, 0, 10**9, pin=False) as upcoming:
        upcoming.take(0)
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_cycles_are_collected_at_fixed_steps_and_at_pauses_only() -> None:
    with Garbage() as garbage:
        assert not gc.isenabled()
        for done, pauses, gone in ((1, False, False), (2, True, True), (EVERY - 1, False, False), (EVERY, False, True)):
            cycle = Cycle()
            seen = weakref.ref(cycle)
            del cycle
            garbage.step(done, pauses)
            assert (seen() is None) == gone, done
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
