"""step_speed.py runs, and what it times computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steppers import Stepper, bare_stepper, batch_of, engine_stepper

from qatscale.config.recipe import load_run_config
from qatscale.engine.runtime import start_runtime
from tests.processes import Python, unlaunched

BENCHMARKS = Path(__file__).parents[2] / "analysis" / "benchmarks"
SMALL = ["batch.sequences=4", "batch.micro_batch=2", "qat.scheme=fused"]


def test_the_command_writes_both_tables(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    arguments = ["--recipe", "debug", "--quick", "--peers", "--threads", "1", "--out", out]
    process = Python([BENCHMARKS / "step_speed.py", *arguments])
    assert process.wait(500) == 0, process.communicate()[0]
    found = json.loads(out.read_text())
    assert found["settings"]["threads"] == 1
    full, quantized = found["tables"]
    assert {"qatscale, DeepSpeed engine", "qatscale, bare loop", "transformers, bare loop"} <= {
        row["name"] for row in full["rows"]
    }
    assert all(row["per_second"] > 0 for row in full["rows"] + quantized["rows"])
    assert "6 x matmul parameters" in full["notes"][0]
    assert "of full precision's speed" in quantized["notes"][1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_engine_and_the_bare_loop_take_the_same_steps(
    quantized: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steppers.RATE", 1e-3)
    config = load_run_config("debug", [*SMALL, f"engine.ds_config=zero1_{precision}"])
    runtime = start_runtime()
    steppers: list[Stepper] = [
        make("x", config, runtime, quantized=quantized) for make in (engine_stepper, bare_stepper)
    ]
    losses = [[stepper.step().item() for _ in range(3)] for stepper in steppers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 2e-3)
    assert losses[0][0] != losses[0][2], "the step changes weights"
    for stepper in steppers:
        stepper.close()


def test_the_batch_is_the_recipes() -> None:
    config = load_run_config("debug", SMALL)
    batch = batch_of(config, torch.device("cpu"))
    assert batch.shape == (4, config.data.sequence_length + 1)
    assert torch.equal(batch, batch_of(config, torch.device("cpu")))


def test_the_script_for_a_gpu_runs_on_toy_sizes(tmp_path: Path) -> None:
    script = BENCHMARKS / "gpu" / "step.py"
    command = (
        f"import sys, torch; sys.path.insert(0, {str(script.parent)!r}); sys.argv = ['step.py', '--device', 'cpu', "
    )
    command += f"'--out', {str(tmp_path)!r}, '--recipes', '86m']; import step; "
    command += "import steppers, qatscale.train.setup as setup; plain = setup.Compilation; "
    command += "setup.Compilation = steppers.Compilation = lambda m, on: plain(m, on, 'eager'); sys.exit(step.main())"
    process = Python(["-c", command])
    assert process.wait(500) == 0, process.communicate()[0]
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["failed"] == 0
    assert "6 x matmul parameters" in found["FLOPs"]
    targets = next(check for check in found["checks"] if check["check"] == "86m: targets")
    assert set(targets["numbers"]) == {"engine over bare", "QAT over full precision"}


@pytest.mark.slow  # analysis/benchmarks/cost_growth.md is its record
def test_cost_over_growth_is_measured_and_drawn(tmp_path: Path) -> None:
    script = BENCHMARKS / "cost_growth.py"
    command = [sys.executable, script, "--quick", "--out", tmp_path, "--threads", "1"]
    done = subprocess.run(command, env=unlaunched(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    points = json.loads((tmp_path / "cost_growth.json").read_text())["points"]
    assert {point["axis"] for point in points} == {"parameters", "micro-batch", "sequence length"}
    assert all(point["fp"] > 0 < point["qat"] for point in points)
    assert (tmp_path / "cost_growth.png").stat().st_size > 10_000
