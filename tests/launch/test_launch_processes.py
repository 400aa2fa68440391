"""The real launchers on two CPU processes: one starts and is stopped, the other goes on; a wrong key is told once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qatscale.engine.checkpoints.files import read_manifest
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.tracking.run_folder import RunFolder
from tests.cli.bad_inputs import run_command
from tests.processes import unlaunched

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"
LAUNCHERS = {
    "script": ["deepspeed", "--num_gpus", "2", TRAIN],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "-m", "qatscale", "train"],
}


def start(launcher: str, *arguments: str) -> subprocess.Popen[str]:
    """`deepspeed --num_gpus 2 launch/train.py …`, or what a user without a clone types."""
    program, *options = LAUNCHERS[launcher]
    return start_program(sys.executable, Path(sys.executable).with_name(str(program)), *options, *arguments)


def start_program(*command: str | Path, **more: str) -> subprocess.Popen[str]:
    """In a process group of its own. more: environment variables."""
    programs = Path(sys.executable).parent  # deepspeed starts `python` from the PATH
    environment = unlaunched() | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )  # fmt: skip


def end(process: subprocess.Popen[str], timeout: float = 300) -> str:
    """What the job printed; nothing of it is left behind."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def steps_done(folder: Path) -> int:
    if not (folder / "metrics.jsonl").exists():
        return 0
    return max((record["step"] for record in RunFolder(folder).records("metrics")), default=0)


@pytest.mark.dist
def test_started_by_torchrun_stopped_and_ended_by_deepspeed(tmp_path: Path, prepared: Path) -> None:
    arguments = ["debug", "name=run", f"output={tmp_path}", f"data.path={prepared}", "tracking.uri=none"]
    arguments.append("tokens=30720")  # 120 steps: the signal comes in time on a busy machine, too
    folder = RunFolder(tmp_path / "run")

    process = start("torchrun", *arguments)
    while process.poll() is None and steps_done(folder.path) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = end(process)
    assert process.returncode != 0
    assert [record["signal"] for record in folder.records("stopped")] == ["SIGTERM"], output
    stopped = folder.records("stopped")[0]["step"]
    manifest = read_manifest(find_checkpoint(folder.path))
    assert manifest.step == stopped
    assert (manifest.layout["processes"], manifest.layout["zero_stage"]) == (2, 1)
    assert folder.status == "stopped"

    process = start("script", *arguments)
    output = end(process)
    assert process.returncode == 0, output
    assert folder.status == "done"
    assert [record["step"] for record in folder.records("resume")] == [stopped]
    assert [record["step"] for record in folder.records("metrics")] == list(range(1, 121))
    assert sorted(path.name for path in folder.logs.iterdir()) == ["rank-0.log", "rank-1.log"]
    assert output.count(f"from step {stopped}: ") == 1, "one process speaks"


@pytest.mark.dist
def test_a_wrong_key_is_told_once(tmp_path: Path) -> None:
    process = start("torchrun", "debug", "tokns=1", f"output={tmp_path}")
    output = end(process)
    assert process.returncode not in (0, None)
    assert output.count("error: tokns: unknown key. Did you mean 'tokens'?") == 1, output
    assert output.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dist
def test_written_launch_scripts_train(tmp_path: Path, prepared: Path) -> None:
    """What `qatscale launch-scripts` writes, under another name than in a clone, on one host of two processes."""
    code, _, error = run_command(["launch-scripts", str(tmp_path / "jobs")])
    assert code == 0, error
    (tmp_path / "jobs" / "hosts").write_text("127.0.0.1 slots=2\n")
    run = [
        "debug",
        "name=run",
        f"data.path={prepared}",
        "tracking.uri=none",
        "tokens=2560",
        "--deepspeed",
        "zero2_fp32",
    ]
    here = {"HOSTFILE": "jobs/hosts", "MASTER_ADDR": "127.0.0.1", "INTERFACE": "lo", "DS_ACCELERATOR": "cpu"}
    process = start_program(tmp_path / "jobs" / "no_ssh.sh", "0", *run, **here)
    output = end(process)
    assert process.returncode == 0, output
    folder = RunFolder(tmp_path / "runs" / "run")  # scripts work in the folder that they lie in
    assert folder.status == "done"
    manifest = read_manifest(find_checkpoint(folder.path))
    assert (manifest.layout["processes"], manifest.layout["zero_stage"]) == (2, 2)
    assert run_command(["launch-scripts", str(tmp_path / "jobs")])[0] == 2, "nobody's edits are overwritten"
