"""Runs of recipe `debug` for the tests of the loop: short, every step logged, no MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from processes import Finished, run

DRIVER = Path(__file__).with_name("runs_driver.py")

STEPS, SWITCH = 12, 7
BASE = [
    "tokens=6144",  # 12 steps of 8 sequences of 64
    "data.sequence_length=64",
    "batch.sequences=8",
    "batch.micro_batch=4",
    "qat.scheme=fused",
    "qat.bits=2",
    f"qat.fraction={(STEPS - SWITCH) / STEPS}",
    "schedule.warmup_fraction=0.2",
    "schedule.cooldown_fraction=0.25",
    "evaluation.tokens=2048",
    "log_interval=1",
    "tracking.uri=none",
]  # fmt: skip


def spec(name: str, output: Path, data: Path, *overrides: str, **more: Any) -> dict[str, Any]:
    return {"overrides": [*BASE, f"name={name}", f"output={output}", f"data.path={data}", *overrides], **more}


def drive(runs: list[dict[str, Any]], folder: Path, ranks: int = 1) -> Finished:
    """Train these runs, in this order, in one set of processes."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    return run([DRIVER, listed], ranks, cwd=folder)


def losses(folder: Path) -> dict[int, float]:
    """Step → loss, as logged, of a run's folder; of steps logged twice the one that counts."""
    from qatscale.tracking.run_folder import RunFolder

    return {record["step"]: record["loss"] for record in RunFolder(folder).records("metrics")}
