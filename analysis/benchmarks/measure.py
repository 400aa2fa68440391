"""Timing of alternatives side by side in one process."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One of the alternatives."""

    name: str
    run: Callable[[], object]
    amount: float = 1.0
    """Units (tokens, bytes, weights) that one call works through."""
    after: Callable[[], object] | None = None
    """Done after every call, and not timed."""


@dataclass(frozen=True)
class Skipped:
    """An alternative that could not be measured, and why."""

    name: str
    why: str


def interleaved(variants: Sequence[Variant], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call: name -> [rounds]. Each round calls every variant once.

    The order turns by one from round to round, so that none always runs in another's wake, and a disturbance of the
    machine falls on neighbours: ratios within a round are steadier than the times. Garbage is collected between rounds
    and not within them.
    """
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names), f"two variants of one name: {names}"
    for _ in range(warmup):
        for variant in variants:
            _seconds(variant)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            gc.collect()
            turn = index % len(variants)
            for variant in (*variants[turn:], *variants[:turn]):
                seconds[variant.name].append(_seconds(variant))
    finally:
        if collects:
            gc.enable()
    return seconds


def _seconds(variant: Variant) -> float:
    wait_for_device()
    start = time.perf_counter()
    variant.run()
    wait_for_device()
    seconds = time.perf_counter() - start
    if variant.after is not None:
        variant.after()
    return seconds


def wait_for_device() -> None:
    """Until a GPU, where this process uses one, has done all it was given."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def use_threads(threads: int | None) -> int:
    """Let torch compute on so many CPU threads (None: as it is); returns how many that are."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
