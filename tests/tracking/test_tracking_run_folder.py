"""A run's folder: what is in it, in which order it is written, and what its status says of real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qatscale.errors import UserError
from qatscale.supervise import process
from qatscale.tracking.environment import environment, git_state
from qatscale.tracking.run_folder import RunFolder
from tests.tracking.synthetic_runs import MakeRun, finish, log_metrics


def test_a_new_run_says_what_it_is(make_run: MakeRun) -> None:
    folder = make_run("r", scheme="fused", bits=2, steps=100, switch=60, cooldown=20)
    assert yaml.safe_load((folder.path / "recipe.yaml").read_text())["qat"]["bits"] == 2
    assert json.loads((folder.path / "ds_config.json").read_text()) == {"zero_optimization": {"stage": 1}}
    run = json.loads((folder.path / "run.json").read_text())
    assert (run["name"], run["n_params"], run["parent"], run["command"][0]) == ("r", 1_000_000, None, "qatscale")
    assert folder.timeline["switch_step"] == 60
    last = {"phase": "qat_cooldown", "start": 80, "end": 100, "quantized": True}
    assert last.items() <= folder.timeline["segments"][-1].items()
    for name in ("logs", "checkpoints", "figures", "exports"):
        assert (folder.path / name).is_dir()
    assert (folder.status, folder.is_done, folder.final) == ("created", False, None)


def test_the_environment_names_versions_machine_and_commit(make_run: MakeRun) -> None:
    around = json.loads((make_run().path / "environment.json").read_text())
    assert around["python"] == ".".join(map(str, sys.version_info[:3]))
    from importlib.metadata import version

    assert around["packages"]["numpy"] == version("numpy")
    assert {"torch", "deepspeed", "mlflow"} <= set(around["packages"])
    assert "pytest" not in around["packages"], "a tool of developers is no dependency of a run"
    assert around["cpu"]["cores"] == os.cpu_count()


def test_the_commit_is_that_of_the_code_and_says_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    assert git_state(tmp_path) is None, "the repository does not track this folder"
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("x = 2\n")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_the_environment_does_not_import_torch() -> None:
    code = (
        "import sys; from qatscale.tracking.environment import environment as e; e(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gpus_are_listed_once_torch_is_there() -> None:
    torch = pytest.importorskip("torch")
    assert len(environment()["gpus"]) == torch.cuda.device_count()


def test_a_second_run_of_the_same_name_is_refused(make_run: MakeRun) -> None:
    make_run("r")
    with pytest.raises(UserError, match=r"name = 'r': .* already holds a run\. Resume it, or give"):
        make_run("r")


def test_a_folder_that_was_left_half_made_can_be_made(make_run: MakeRun) -> None:
    folder = make_run("r")
    folder.run_file.unlink()
    assert make_run("r").run_file.exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_run_is_named(tmp_path: Path, exists: bool) -> None:
    path = tmp_path if exists else tmp_path / "none"
    with pytest.raises(UserError, match="holds no run.json" if exists else "the folder does not exist"):
        RunFolder.open(path)


def test_records_leave_out_what_a_resume_took_back(make_run: MakeRun) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    log_metrics(folder, 0, 50)
    folder.close()
    again = RunFolder.open(folder.path)
    again.append("resume", step=30)
    log_metrics(again, 30, 40)
    assert [r["step"] for r in again.records("metrics")] == [10, 20, 30, 40]
    assert [r["event"] for r in again.records("start", "resume")] == ["start", "resume"]


def test_the_marker_comes_last_and_holds_the_final_metrics(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    seen: list[str] = []
    original = Path.replace

    def spy(self: Path, target: Path) -> Path:
        seen.append(Path(target).name)
        assert folder.records("final"), "the final event is there before the marker"
        assert not folder.is_done
        return original(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    final = finish(folder, {"fp": 2.5, "ptq2": float("inf")})
    assert seen == ["done.json"]
    assert folder.status == "done"
    assert RunFolder.open(folder.path).final == final
    assert folder.final is not None
    assert folder.final["final/val_loss_ptq2"] == float("inf")


def test_a_parent_is_found_where_it_was_or_beside_its_branch(make_run: MakeRun, tmp_path: Path) -> None:
    trunk = make_run("trunk")
    assert trunk.parent is None
    branch = make_run("branch", parent=(trunk, 50))
    assert branch.parent is not None
    assert branch.parent.path == trunk.path
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    found = RunFolder.open(moved / "branch").parent
    assert found is not None
    assert found.path == moved / "trunk"
    file = moved / "trunk" / "run.json"
    lineage = {"parent": {"name": "branch", "folder": "gone", "step": 50}}
    file.write_text(json.dumps(json.loads(file.read_bytes()) | lineage))
    with pytest.raises(UserError, match=r"branch/run.json': is damaged: it descends from itself"):
        _ = RunFolder.open(moved / "branch").parent
    file.unlink()
    assert RunFolder.open(moved / "branch").parent is None


def test_an_event_of_another_name_is_a_mistake_of_the_caller(make_run: MakeRun) -> None:
    with pytest.raises(AssertionError):
        make_run().append("metric", step=1)


WRITER = """
import sys, time
from qatscale.tracking.run_folder import RunFolder
folder = RunFolder.open(sys.argv[1])
folder.append(sys.argv[2], step=0)
print("ready", flush=True)
time.sleep(600)
"""


def writer(folder: RunFolder, event: str = "start") -> subprocess.Popen[str]:
    """Another process that writes the folder, and has begun to."""
    command = [sys.executable, "-c", WRITER, str(folder.path), event]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_status_follows_the_process_that_writes(make_run: MakeRun) -> None:
    folder = make_run()
    child = writer(folder)
    assert folder.status == "running"
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but not collected: a zombie
    assert folder.status == "killed"
    child.wait()
    assert folder.status == "killed"
    assert folder.has_ended
    second = writer(folder, "resume")
    assert folder.status == "running"
    folder.append("stopped", step=7, signal="SIGTERM")
    assert folder.status == "stopped"
    second.kill()
    second.wait()
    assert folder.status == "stopped"
    folder.append("resume", step=7)
    assert folder.status == "running", "this very process"
    folder.append("failed", step=8, error="ValueError: x")
    assert folder.status == "failed"


def test_a_process_of_another_machine_cannot_be_judged(make_run: MakeRun) -> None:
    folder = make_run()
    with folder.metrics_file.open("w") as file:
        elsewhere = process.identity() | {"host": "elsewhere"}
        file.write(json.dumps({"event": "start", "step": 0, "time": 0.0, "process": elsewhere}) + "\n")
    assert folder.status == "running?"
    assert not folder.has_ended


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"boot_id": "an earlier boot"}])
def test_a_process_id_that_came_round_again_is_not_the_writer(change: dict[str, object]) -> None:
    assert process.is_alive(process.identity()) is True
    assert process.is_alive(process.identity() | change) is False
