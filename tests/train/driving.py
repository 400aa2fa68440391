"""Runs of recipe `debug` for the tests of the loop: short, every step logged, no MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.processes import Finished, run

if TYPE_CHECKING:
    from qatscale.config.schema import RunConfig

DRIVER = Path(__file__).with_name("runs_driver.py")

STEPS, SWITCH = 12, 7
BASE = [
    # Tolerances were measured from these initial weights. From others a weight may lie on a quantizer's threshold, and
    # layouts that round it to either side part by 1e-5 (seen from those of init=2, layouts.md).
    "init=1",
    "tokens=6144",  # 12 steps of 8 sequences of 64
    "data.sequence_length=64",
    "batch.sequences=8",
    "batch.micro_batch=4",
    "qat.scheme=fused",
    "qat.bits=2",
    f"qat.fraction={(STEPS - SWITCH) / STEPS}",
    "schedule.warmup_tokens=1024",
    "schedule.cooldown_fraction=0.25",
    "evaluation.tokens=1024",
    "log_interval=1",
    "tracking.uri=none",
]  # fmt: skip


def spec(name: str, output: Path, data: Path, *overrides: str, **more: Any) -> dict[str, Any]:
    return {"overrides": [*BASE, f"name={name}", f"output={output}", f"data.path={data}", *overrides], **more}


def drive(runs: list[dict[str, Any]], folder: Path, ranks: int = 1) -> Finished:
    """Train these runs, in this order, in one set of processes."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    return run([DRIVER, listed], ranks, cwd=folder, timeout=800)


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run's folder, one per logged step; of steps logged twice those that count."""
    from qatscale.tracking.run_folder import RunFolder

    return RunFolder(folder).records("metrics")


def losses(folder: Path) -> dict[int, float]:
    """Step → loss, as logged."""
    return {record["step"]: record["loss"] for record in records(folder)}


def config(run: dict[str, Any], *overrides: str) -> RunConfig:
    """The configuration of a `spec`, with more overrides."""
    from qatscale.config.recipe import load_run_config

    return load_run_config("debug", [*run["overrides"], *overrides])


def assert_same_state(one: Path, other: Path) -> None:
    """The checkpoints `one` and `other` hold the same masters and Adam states, bit for bit."""
    import torch

    from qatscale.engine.checkpoints.reader import CheckpointReader

    found, expected = CheckpointReader(one), CheckpointReader(other)
    assert found.manifest.step == expected.manifest.step
    assert found.manifest.parameters == expected.manifest.parameters
    for name in expected.manifest.parameters:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found.parameter(name, kind), expected.parameter(name, kind)), f"{kind} of {name}"
