"""Studies trained for real: workers that die, fail, stop, grow and come from elsewhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from qatlaw.results import read_results
from qatlaw.run_folders import folder_records
from qatlaw.runs import collect
from qatscale.engine.checkpoints.files import list_checkpoints
from qatscale.errors import FailedError
from qatscale.study.folder import StudyFolder
from qatscale.study.lay_out import lay_out
from qatscale.study.run import LocalWorkers
from qatscale.study.state import StudyState
from qatscale.study.worker import Worker
from qatscale.supervise import claims
from qatscale.supervise.claims import Claims
from qatscale.tracking.compare import run_folders
from qatscale.train.run import train
from tests.processes import Python, unlaunched
from tests.study import studies

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]


def test_a_study_ends_with_a_row_for_each_run_a_table_and_a_report(tiny: Path) -> None:
    jobs = json.loads((tiny / "tree.json").read_text())
    rows = read_results(tiny / "results.csv")
    assert [row.name for row in rows] == [job["name"] for job in jobs], "in the order of the tree"
    assert len(rows) == 11
    studies.trained_once(tiny)
    assert (tiny / "report" / "report.html").is_file()


def test_results_say_to_a_fit_what_the_run_folders_say(tiny: Path) -> None:
    from_rows = collect(read_results(tiny / "results.csv"), "rows").table
    from_folders = collect(folder_records(tiny / "runs"), "folders").table
    assert from_rows.hash == from_folders.hash
    assert len(from_rows) == len(from_folders)


def test_only_final_checkpoints_and_those_to_keep_are_left(tiny: Path) -> None:
    """What branches needed is gone with the last of them. Steps 16 and 32 stay in the runs that trained them."""
    for job in json.loads((tiny / "tree.json").read_text()):
        left = list_checkpoints(tiny / "runs" / job["name"] / "checkpoints")
        kept = [step for step in (16, 32) if step > job["start"]]
        assert [path.name for path in left] == [f"step-{step:08d}" for step in (*kept, job["steps"])], job["name"]


def test_a_run_equals_the_same_run_trained_alone(tiny: Path, tmp_path: Path) -> None:
    """In a tree, in a process that trained others before, the losses are bit for bit those of a run of its own."""
    name = next(job["name"] for job in json.loads((tiny / "tree.json").read_text()) if job["parent"])
    process = Python(["-m", "qatscale", "train", tiny / "jobs" / f"{name}.yaml", f"output={tmp_path}"])
    assert process.wait(500) == 0, process.communicate()[0]
    alone, inside = (StudyFolder(tiny).run(name), run_folders(tmp_path)[0])
    assert alone.final is not None
    assert inside.final is not None
    for key in ("final/val_loss", "final/val_loss_fp_view"):
        assert alone.final[key] == inside.final[key]


def disturbed(tiny: Path, folder: Path, kills: int, longest_pause: float) -> None:
    """The study again with workers that are killed, and the same results to the byte. A run in which five workers die
    counts as failed, so that runs get the time to end between two kills."""
    chance = random.Random(kills)
    process = studies.study("run", tiny / "study.yaml", "--out", folder, "--workers", "2")
    for _ in range(kills):
        studies.kill_one(folder, chance.uniform(longest_pause / 3, longest_pause), chance)
    code, output = studies.finish(process)
    assert code == 0, output
    studies.trained_once(folder)
    assert (folder / "results.csv").read_bytes() == (tiny / "results.csv").read_bytes()


def test_killed_workers_change_no_result(tiny: Path, tmp_path: Path) -> None:
    disturbed(tiny, tmp_path / "study", kills=3, longest_pause=2)


@pytest.mark.slow
def test_ten_kills_in_32_runs_change_no_result(prepared: Path, tmp_path: Path) -> None:
    file = studies.write_study(
        tmp_path / "large.yaml", prepared, name="large", bits="[1, 2, 4]", tokens="[10_240, 20_480]"
    )
    undisturbed = tmp_path / "undisturbed"
    code, output = studies.finish(studies.study("run", file, "--out", undisturbed, "--workers", "2"))
    assert code == 0, output
    assert len(read_results(undisturbed / "results.csv")) == 32
    disturbed(undisturbed, tmp_path / "study", kills=10, longest_pause=5)


def test_a_stopped_study_goes_on_and_trains_nothing_twice(tiny: Path, tmp_path: Path) -> None:
    """First through the script of a Slurm array, whose signal before the end of the job reaches the worker."""
    folder = tmp_path / "study"
    lay_out(tiny / "study.yaml", StudyFolder(folder))
    process = studies.start([ROOT / "launch" / "slurm_study.sh", folder], env={"VENV": sys.prefix}, cwd=ROOT)
    until(lambda: len(list(folder.glob("runs/*/done.json"))) >= 1)
    process.send_signal(signal.SIGUSR1)
    code, output = studies.finish(process)
    assert code == 75, output
    assert not studies.workers_of(folder)
    process = studies.study("run", folder, "--workers", "1")
    until(lambda: len(list(folder.glob("runs/*/done.json"))) >= 3)
    process.send_signal(signal.SIGINT)
    code, output = studies.finish(process)
    assert code == 130, output
    assert "continues from there" in output
    assert not studies.workers_of(folder)
    code, output = studies.finish(studies.study("run", folder, "--workers", "1"))
    assert code == 0, output
    studies.trained_once(folder)
    assert (folder / "results.csv").read_bytes() == (tiny / "results.csv").read_bytes()


def test_a_signal_that_comes_too_late_for_its_run_is_told_to_the_worker(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last step and the end the run's own handlers take the signal, and it is done all the same."""
    folder = StudyFolder(tiny)
    job = next(iter(folder.jobs.values()))
    monkeypatch.setattr("qatscale.train.run.decide", lambda *_: signal.raise_signal(signal.SIGUSR1))  # None: it is done
    worker = Worker(folder)
    assert worker._train_here(job, None)
    assert worker._stopped == signal.SIGUSR1
    assert train(folder.config(job.name)).signal == signal.SIGUSR1


def until(holds: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)


def test_a_failing_run_blocks_its_own_branches_alone(prepared: Path, tmp_path: Path) -> None:
    """QAT from scratch at an absurd rate diverges at once, and the longer run that would branch from it never starts.
    A sequential run diverges after the checkpoint that others need: they go on."""
    file = studies.write_study(
        tmp_path / "failing.yaml", prepared, tokens="[10_240, 20_480]", bits="[2]", fractions="[0.5, 1]",
        schemes="[sequential]", vary="{qat.learning_rate: [1e30, 3e-3]}",
    )  # fmt: skip
    folder = tmp_path / "study"
    code, output = studies.finish(studies.study("run", file, "--out", folder, "--workers", "1"))
    assert code == 1, output
    state = StudyState(StudyFolder(folder))
    found = {name: one.state for name, one in state.refresh().items()}
    for name, one in found.items():
        if "3e-03" in name or "0.003" in name:
            assert one == "done", name
        elif "scratch" in name and "20.48K" in name:
            assert one == "blocked", name
        else:
            assert one == "failed", name
            assert "loss" in state.states[name].reason or "gradient" in state.states[name].reason
    assert "blocked: 1 run" in output
    victim = next(name for name, one in found.items() if one == "failed" and "sequential" in name)
    code, output = studies.finish(studies.study("run", folder, "--workers", "1", "--retry", victim))
    assert code == 1
    tried = {name: len(Claims(folder / "claims").history(name)) for name in found}
    assert tried[victim] == 3, "the failure, the retry's note, the second failure"
    assert all(number <= 1 for name, number in tried.items() if name != victim)


def test_a_worker_that_cannot_start_is_no_wrong_input(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(studies.write_study(tmp_path / "tiny.yaml", prepared), folder := StudyFolder(tmp_path / "study"))
    monkeypatch.setattr(sys, "executable", shutil.which("false"))

    def watch() -> None:
        while local.restart_dead():
            time.sleep(0.01)

    with LocalWorkers(folder, 1) as local, pytest.raises(FailedError, match=r"worker 0 ended with code 1\."):
        watch()


def test_a_stopped_worker_ends_with_its_study(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a claim of a host that died holds up no change of the study, once it has rested."""
    lay_out(studies.write_study(tmp_path / "tiny.yaml", prepared), folder := StudyFolder(tmp_path / "study"))
    (script := tmp_path / "stops").write_text("#!/bin/sh\nkill -STOP $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with LocalWorkers(folder, 1) as local:
        process = local._slots[0].process
        assert process is not None
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    assert process.returncode == -signal.SIGTERM
    claim = folder.claims.take(next(iter(folder.jobs)), 0, "node7-4711")
    assert claim is not None
    claim.path.write_text(claim.path.read_text().replace(claim.content["process"]["host"], "node7"))
    monkeypatch.setattr(claims, "EXPIRY", 0.5)
    lay_out(studies.write_study(tmp_path / "tiny.yaml", prepared, bits="[2]"), folder)


def test_a_full_disk_fails_no_run_and_the_same_command_continues(prepared: Path, tmp_path: Path) -> None:
    file = studies.write_study(tmp_path / "full.yaml", prepared, bits="[4]", fractions="[1]", keep_at="[]")
    folder = tmp_path / "study"
    command = [sys.executable, "-m", "qatscale", "study", "run", file, "--out", folder, "--workers", "1"]
    code, output = studies.finish(studies.start(["bash", "-c", 'ulimit -f 64; exec "$@"', "limited", *command]))
    assert code == 1, output
    assert "File too large" in output
    assert {one.state for one in StudyState(StudyFolder(folder)).refresh().values()} == {"ready"}
    code, output = studies.finish(studies.study("work", folder))
    assert code == 0, output
    studies.trained_once(folder)


def test_a_study_that_grows_keeps_what_is_done(tiny: Path, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(tiny, folder)
    before = {row.name: row for row in read_results(folder / "results.csv")}
    file = studies.write_study(tmp_path / "tiny.yaml", prepared, fractions="[0, 0.25, 0.5, 0.75, 1]", seeds="[0]")
    code, output = studies.finish(studies.study("run", file, "--out", folder, "--workers", "1"))
    assert code == 0, output
    after = {row.name: row for row in read_results(folder / "results.csv")}
    assert len(after) == len(before) + 4
    assert all(after[name].final == before[name].final for name in before)
    assert all(len(Claims(folder / "claims").history(name)) == 1 for name in after)
    notes = lay_out(studies.write_study(file, prepared, bits="[1, 2, 4]"), StudyFolder(folder))
    assert any("no PTQ at the new ones" in note and "-fp" in note for note in notes)
    assert sum("1bit" in name for name in StudyFolder(folder).jobs) >= 2, "another bit width is a larger study"
    lay_out(studies.write_study(file, prepared, bits="[2]", fractions="[0.5]"), StudyFolder(folder))
    left = StudyFolder(folder).jobs
    assert {name for name in left if "f0.5" in name} == {name for name in after if "2bit-f0.5" in name}
    assert len(left) == 3, "and the full-precision run that they branch from"
    assert len(list((folder / "runs").iterdir())) == len(after), "no folder is removed"


def test_what_was_trained_elsewhere_is_not_trained_again(tiny: Path, tmp_path: Path) -> None:
    """From results.csv alone, as a repository keeps it; by the script that takes a study to a GPU."""
    work, records = tmp_path / "work", tmp_path / "records"
    work.mkdir()
    records.mkdir()
    lines = (tiny / "results.csv").read_text().splitlines(keepends=True)
    (records / "results.csv").write_text("".join(lines[:1] + lines[2:]))
    missing = lines[1].split(",")[0]
    script = ROOT / "analysis" / "benchmarks" / "gpu" / "study.py"
    (work / "data").mkdir()
    (work / "data" / "corpus").symlink_to(StudyFolder(tiny).config(missing).data.path)  # type: ignore[arg-type]
    command = [sys.executable, str(script), "--device", "cpu", "--study", str(tiny / "study.yaml")]
    command += ["--work", str(work), "--out", str(records)]
    done = subprocess.run(command, env=unlaunched(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (work / "study" / "runs").iterdir()] == [missing]
    assert sorted((records / "results.csv").read_text().splitlines()) == sorted("".join(lines).splitlines())
    record = json.loads((records / "study.json").read_text())
    assert record["checks"][1]["numbers"]["runs done here"] == 1


def test_a_run_may_not_become_another_one(tiny: Path, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(tiny, folder)
    changed = studies.TINY["sizes"].replace("model.layers=1", "model.layers=2")
    file = studies.write_study(tmp_path / "tiny.yaml", prepared, sizes=changed)
    code, output = studies.finish(studies.study("run", file, "--out", folder))
    assert code == 2
    assert "model.layers = 1; the study now says 2" in output


def test_status_counts_what_is_there(tiny: Path) -> None:
    code, output = studies.finish(studies.study("status", tiny, "--json"))
    assert code == 0
    found = json.loads(output)
    assert found["counts"] == {"done": 11, "running": 0, "ready": 0, "waiting": 0, "failed": 0, "blocked": 0}
    assert found["tokens_done"] == found["tokens"]
    code, output = studies.finish(studies.study("status", tiny))
    assert "11 of 11 runs done" in output


def test_runs_of_several_processes_go_through_the_launcher(tiny: Path, prepared: Path, tmp_path: Path) -> None:
    """Two processes reach the losses of one to rounding, from a trunk and into a branch."""
    sizes = studies.TINY["sizes"].replace("{name", "{processes: 2, name").replace("]}", ", batch.micro_batch=2]}")
    file = studies.write_study(
        tmp_path / "wide.yaml", prepared, sizes=sizes, fractions="[0, 0.5]", bits="[2]", schemes="[fused]"
    )
    file.write_text(file.read_text().replace(", batch.micro_batch=4", ""))
    code, output = studies.finish(studies.study("run", file, "--out", tmp_path / "study", "--workers", "1"))
    assert code == 0, output + "".join(path.read_text() for path in (tmp_path / "study" / "logs").iterdir())
    single = {row.name: row for row in read_results(tiny / "results.csv")}
    for row in read_results(tmp_path / "study" / "results.csv"):
        run = StudyFolder(tmp_path / "study").run(row.name)
        assert json.loads((run.path / "ds_config.json").read_text())["gradient_accumulation_steps"] == 1
        assert row.final["final/val_loss"] == pytest.approx(single[row.name].final["final/val_loss"], rel=1e-4)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_a_worker_on_another_host_takes_part(tiny: Path, tmp_path: Path) -> None:
    """Another host name and process namespace, and the folder mounted elsewhere. It goes on with a run whose worker
    was killed on the first host, once that claim has rested."""
    folder, mount = tmp_path / "study", tmp_path / "elsewhere"
    mount.mkdir()
    first = studies.study("run", tiny / "study.yaml", "--out", folder, "--workers", "1")
    until(lambda: bool(list(folder.glob("claims/*.json"))))
    there = (
        f"hostname elsewhere && mount --bind {folder} {mount} && exec {sys.executable} -m qatscale study work {mount}"
    )
    second = subprocess.Popen(
        ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", there],
        env=unlaunched(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    codes = studies.finish(second), studies.finish(first)
    assert [code for code, _ in codes] == [0, 0], codes
    claims = Claims(folder / "claims").attempts().values()
    hosts = {one.worker.rpartition("-")[0] for one in claims}
    assert "elsewhere" in hosts
    assert len(hosts) == 2
    studies.trained_once(folder)
    assert (folder / "results.csv").read_bytes() == (tiny / "results.csv").read_bytes()
