"""What the spike guard costs: its share of the CPU time of a training step, on one process.

    python analysis/benchmarks/guard_cost.py [RECIPE] [KEY=VALUE…]

Every call of the guard is timed inside a real training, so that one run gives both times. The clocks count the
process's own CPU time, which a busy machine hardly changes; the timers themselves count for the guard.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qatscale.config.recipe import load_run_config
from qatscale.data.prepare import prepare
from qatscale.engine.spikes import SpikeGuard, SpikeState
from qatscale.train.run import train

PARTS = {SpikeGuard: ("_allows", "after_step"), SpikeState: ("batch_of",)}
spent, steps = 0.0, [(0.0, 0.0)]
"""Seconds in the guard so far, and (CPU time, `spent`) after each step."""


def timed(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(*arguments: Any) -> Any:
        global spent
        began = time.process_time()
        try:
            return call(*arguments)
        finally:
            spent += time.process_time() - began
            if call.__name__ == "after_step":
                steps.append((time.process_time(), spent))

    return wrapper


def main() -> None:
    recipe, *overrides = sys.argv[1:] or ["debug"]
    for owner, names in PARTS.items():
        for name in names:
            setattr(owner, name, timed(getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        prepare(["self:2M"], Path(folder, "data"), vocab_size=512, validation_fraction=0.05, workers=1)
        where = [f"data.path={folder}/data", f"output={folder}", "tracking.uri=none"]
        train(load_run_config(recipe, [*where, *overrides]))
    pairs = list(itertools.pairwise(steps))[10:]
    step = statistics.median(after[0] - before[0] for before, after in pairs)
    guard = statistics.median(after[1] - before[1] for before, after in pairs)
    print(f"{len(pairs)} steps: {1e3 * step:.2f} ms a step, {1e6 * guard:.1f} µs in the guard, {guard / step:.3%}")


if __name__ == "__main__":
    main()
