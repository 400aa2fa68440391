"""Tiny studies and what tests ask of their folders."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qatscale.supervise.claims import Claims
from tests.processes import unlaunched

TINY = {
    "name": "tiny",
    "sizes": "[{name: t, recipe: debug, set: [model.layers=1, model.hidden_size=32, model.intermediate_size=64]}]",
    "tokens": "[10_240]",
    "bits": "[2, 4]",
    "fractions": "[0, 0.25, 0.5, 1]",
    "schemes": "[sequential, fused]",
    "keep_at": "[4096, 8192]",
}
"""11 runs of 40 steps."""


def write_study(file: Path, data: Path, **changes: str) -> Path:
    keys = TINY | changes
    shared = f"[data.path={data}, tracking.uri=none, batch.micro_batch=4, evaluation.tokens=2048]"
    file.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()) + f"set: {shared}\n")
    return file


def study(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start `qatscale study …`."""
    return start([sys.executable, "-m", "qatscale", "study", *arguments])


def start(
    command: Sequence[str | Path], env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    environment = unlaunched() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | (env or {})
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=cwd
    )


def finish(process: subprocess.Popen[str], timeout: float = 540) -> tuple[int, str]:
    """(exit code, output)."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def trained_once(folder: Path) -> None:
    """Every run of the study has one attempt that ended well and one final record."""
    claims = Claims(folder / "claims")
    for run in sorted((folder / "runs").iterdir()):
        history = claims.history(run.name)
        assert [one.state for one in history].count("done") <= 1, run.name
        events = [json.loads(line)["event"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert events.count("final") == 1, run.name
        assert events.count("start") == 1, run.name


def workers_of(folder: Path) -> list[int]:
    """Processes that hold a claim now."""
    attempts = Claims(folder / "claims").attempts().values()
    running = [one for one in attempts if one.state == "running"]
    return [int(one.worker.rpartition("-")[2]) for one in running]


def kill_one(folder: Path, after: float, chance: random.Random, timeout: float = 120) -> None:
    """SIGKILL a worker that holds a claim, `after` seconds from now at the earliest."""
    time.sleep(after)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if victims := workers_of(folder):
            os.kill(chance.choice(victims), signal.SIGKILL)
            return
        time.sleep(0.05)
    raise TimeoutError("no worker holds a claim")
