"""checkpoint_speed.py, and the script for a GPU on a CPU: run for real on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import Python

BENCHMARKS = Path(__file__).parents[2] / "analysis" / "benchmarks"
BENCHMARK, SCRIPT = BENCHMARKS / "checkpoint_speed.py", BENCHMARKS / "gpu" / "checkpoint.py"


def finished(*command: str | Path) -> str:
    process = Python(command)
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.dist
def test_the_benchmark_writes_what_it_measured_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    out = tmp_path / "result.json"
    shown = finished(BENCHMARK, "--quick", "--folder", tmp_path / "disk", "--out", out)
    assert "Training stands still" in shown
    result = json.loads(out.read_text())
    assert result["settings"]["quick"] is True
    bytes_of_state = 12 * result["settings"]["parameters"]
    standing, durable, beside, loading = result["tables"]
    assert [row["name"] for row in standing["rows"]] == [
        "plain copy to host memory", "checkpoint.background", "checkpoint.background=false",
        "DeepSpeed save_checkpoint",
    ]  # fmt: skip
    written = {row["name"]: row["extra"]["MB written"] * 1e6 for row in durable["rows"]}
    assert written["plain write of the same bytes"] == bytes_of_state
    for ours in ("checkpoint.background", "checkpoint.background=false"):
        assert bytes_of_state < written[ours] < 1.05 * bytes_of_state
    assert written["DeepSpeed save_checkpoint"] > 1.3 * bytes_of_state, "the fp32 weights once more"
    rows = [row for table in (standing, durable, beside, loading) for row in table["rows"]]
    assert all(row["seconds"] > 0 for row in rows)
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.dist
def test_the_gpu_script_finds_the_written_state_right(tmp_path: Path) -> None:
    finished(SCRIPT, "--device", "cpu", "--out", tmp_path / "out", "--folder", tmp_path, "--recipe", "debug")
    record = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert [check["passed"] for check in record["checks"]] == [True, True]
    numbers = record["checks"][0]["numbers"]
    assert numbers["differing"] == 0
    assert numbers["moved by the steps"] > numbers["slices"] / 2, "all but the scales of a run without QAT"
