"""What reading ahead and collecting garbage at chosen moments gain: parts of the training loop, with and without.

    python analysis/benchmarks/loop_tricks.py DATA [--recipe quickstart] [--steps 100] [--rounds 7] [--threads 1]

DATA: a prepared folder whose tokens the recipe's model has. The loop is the DeepSpeed step on batches of that folder;
each round takes so many steps in every form, in turns.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from measure import Variant, interleaved, use_threads
from result import Table
from steppers import training_step

from qatscale.config import load_run_config
from qatscale.data.open import open_batches
from qatscale.engine.runtime import start_runtime
from qatscale.train.garbage import Garbage
from qatscale.train.prefetch import Prefetch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    use_threads(asked.threads)
    config = load_run_config(asked.recipe, [f"data.path={asked.data}", "qat.scheme=scratch"])
    batches = open_batches(config)
    runtime = start_runtime()
    step, close = training_step(config, runtime)

    def direct(take: int) -> torch.Tensor:
        return torch.from_numpy(batches.batch(take, 0, 1))

    def loop(ahead: bool, chosen: bool) -> Callable[[], None]:
        def run() -> None:
            upcoming = Prefetch(lambda i: batches.batch(i, 0, 1), 0, asked.steps, pin=runtime.device.type == "cuda")
            gc.enable()
            with upcoming if ahead else nullcontext(), Garbage() if chosen else nullcontext() as garbage:
                for index in range(asked.steps):
                    step(upcoming.take(index) if ahead else direct(index))
                    if garbage is not None:
                        garbage.step(index + 1, pauses=False)
            gc.disable()

        return run

    tokens = float(asked.steps * config.tokens_per_step)
    variants = [
        Variant("read ahead, garbage at chosen moments", loop(True, True), tokens),
        Variant("read in the step", loop(False, True), tokens),
        Variant("garbage whenever Python wants", loop(True, False), tokens),
    ]
    seconds = interleaved(variants, asked.rounds, warmup=1)
    close()
    table = Table.of("loop", "tokens", variants, seconds, reference=variants[0].name)
    for row in table.rows:
        low, high = row.ratio_quartiles
        print(f"| {row.name} | {row.per_second:,.0f} | {row.ratio:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main()
