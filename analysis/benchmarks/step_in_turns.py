"""A step of one checkout against that of another: the same training in both, which take turns step by step.

    python analysis/benchmarks/step_in_turns.py OLD NEW RECIPE DATA_OLD DATA_NEW [--processes N] [KEY=VALUE…]

RECIPE: a file that both read. DATA_OLD, DATA_NEW: the same text, prepared by each. While a checkout takes a step the
other one waits, so that both meet the machine in the same moods; runs one after the other differ by 5 % and more here.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COLD = 20
"""Steps after the start and after the switch that do not count."""
PARTS = ("step", "engine", "beside")
"""Seconds: an entire step, DeepSpeed's engine in it, and what the loop does beside the engine."""


def train_in_turns(out: str, arguments: list[str]) -> None:
    """Train with the checkout that PYTHONPATH names, one step for each byte in the pipe; write the seconds of each."""
    import qatscale.train.loop as loop
    from qatscale.cli import main

    mine, other = int(os.environ["MINE"]), int(os.environ["OTHER"])
    steps: list[dict[str, Any]] = []
    began, apply, take = 0.0, loop.apply_settings, loop.train_step

    def begin(engine: Any, settings: Any) -> None:
        nonlocal began
        if steps:
            steps[-1]["step"] = time.perf_counter() - began
            os.write(other, b".")
        os.read(mine, 1)
        began = time.perf_counter()
        steps.append({"phase": settings.phase, "engine": 0.0})
        apply(engine, settings)

    def timed(*given: Any, **named: Any) -> Any:
        losses = take(*given, **named)
        while True:
            start = time.perf_counter()
            loss = next(losses, None)
            steps[-1]["engine"] += time.perf_counter() - start
            if loss is None:
                return
            yield loss

    loop.apply_settings, loop.train_step = begin, timed
    sys.argv = ["qatscale", "train", *arguments]
    try:
        main()
    finally:
        os.write(other, bytes(10_000))  # the other one need not wait any more
        if os.environ.get("RANK", "0") == "0":
            done = [step | {"beside": step["step"] - step["engine"]} for step in steps[:-1]]
            Path(out).write_text(json.dumps(done))


def start(checkout: str, out: Path, arguments: list[str], pipes: list[tuple[int, int]], port: int) -> list[Any]:
    """pipes: for each process the end that it reads and the one that lets the other checkout go on."""
    processes, place = [], {"PYTHONPATH": f"{checkout}:{checkout}/analysis", "OMP_NUM_THREADS": "1"}
    for rank, (mine, other) in enumerate(pipes):
        own = {"MINE": str(mine), "OTHER": str(other)}
        if len(pipes) > 1:
            world = {"WORLD_SIZE": len(pipes), "LOCAL_WORLD_SIZE": len(pipes), "RANK": rank, "LOCAL_RANK": rank}
            own |= {key: str(value) for key, value in world.items()} | {"MASTER_PORT": str(port)}
            own |= {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, __file__, "--child", str(out), *arguments, f"output={out.parent / out.stem}"]
        quiet = subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=os.environ | place | own, pass_fds=(mine, other), stdout=quiet))
    return processes


def compare(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    switch = next((i for i, step in enumerate(new) if step["phase"].startswith("qat")), len(new))
    for name, steps in (("full precision", range(COLD, switch)), ("QAT", range(switch + COLD, len(new)))):
        for part in PARTS if len(steps) > 1 else ():
            pairs = [(old[i][part], new[i][part]) for i in steps]
            draws = sorted(ratio(random.choices(pairs, k=len(pairs))) for _ in range(1000))
            millis = [1e3 * statistics.median(seconds) for seconds in zip(*pairs, strict=True)]
            print(
                f"{name:15} {part:7} {len(pairs):5} steps  median {millis[0]:8.3f} and {millis[1]:8.3f} ms  "
                f"sums {ratio(pairs):.4f} ({draws[25]:.4f} to {draws[974]:.4f})"
            )


def ratio(pairs: list[tuple[float, float]]) -> float:
    return sum(new for _, new in pairs) / sum(old for old, _ in pairs)


def main() -> None:
    arguments, count = sys.argv[1:], 1
    if "--processes" in arguments:
        at = arguments.index("--processes")
        count = int(arguments.pop(at + 1))
        arguments.pop(at)
    old, new, recipe, *data = arguments[:5]
    pipes = [[os.pipe() for _ in range(count)] for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"{i}.json") for i in range(2)]
        processes = []
        for i, checkout in enumerate((old, new)):
            given = [recipe, f"data.path={data[i]}", "tracking.uri=none", *arguments[5:]]
            ends = [(pipes[i][rank][0], pipes[1 - i][rank][1]) for rank in range(count)]
            processes += start(str(Path(checkout).resolve()), outs[i], given, ends, 29610 + i)
        for _, end in pipes[0]:
            os.write(end, b".")
        for process in processes:
            process.wait()
        compare(*(json.loads(out.read_text()) for out in outs))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train_in_turns(sys.argv[2], sys.argv[3:])
    else:
        main()
