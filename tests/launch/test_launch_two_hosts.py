"""Two hosts on one machine (hosts.py), each with its own sshd and name: DeepSpeed's launcher through pdsh, and without
ssh; a rank that is killed and a wire that is cut on the way; the losses are those of one host."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qatscale.engine.checkpoints.files import read_manifest
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.tracking.run_folder import RunFolder
from tests import processes
from tests.launch.hosts import CannotError, Host, two_hosts

LAUNCH = Path(__file__).parents[2] / "launch"
RUN = [
    "debug", "tracking.uri=none", "optimizer.learning_rate=3e-4", "checkpoint.interval=1280", "engine.stall_timeout=10",
    "tokens=20480",
]  # fmt: skip
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "VENV": sys.prefix}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts(tmp_path_factory.mktemp("two")) as pair:
            yield pair
    except CannotError as reason:
        pytest.skip(f"two hosts cannot be had: {reason}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs go, and where `deepspeed` is started: with a hostfile and the environment for all hosts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "hostfile").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path, prepared: Path) -> dict[int, float]:
    """The losses of the same run by two processes on one host."""
    finished = processes.run([LAUNCH / "train.py", *RUN, "name=one", f"output={folder}", f"data.path={prepared}"], 2)
    assert finished.codes == [0, 0], finished.output
    return losses(folder / "one")


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in RunFolder(run).records("metrics")}


def launch(host: Host, folder: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """One of the scripts that a person starts, told its hosts as a person would tell it."""
    return host.run(
        [LAUNCH / script, *arguments], folder, HOSTFILE=str(folder / "hostfile"), TMPDIR=str(folder), **ENVIRONMENT
    )


def wait_for_step(run: RunFolder, step: int, *jobs: subprocess.Popen[str]) -> None:
    while not run.metrics_file.exists() or max(losses(run.path), default=0) < step:
        assert all(job.poll() is None for job in jobs), end(*jobs)
        time.sleep(0.05)


def end(*jobs: subprocess.Popen[str], timeout: float = 400) -> list[str]:
    """What each printed; ends them in any case."""
    try:
        return [job.communicate(timeout=timeout)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()


def assert_all_ended(*hosts: Host) -> None:
    for host in hosts:
        until = time.monotonic() + 40  # DeepSpeed's launcher gives what is left 30 s
        while (left := host.processes("train.py")) and time.monotonic() < until:
            time.sleep(0.5)
        assert left == [], f"still running on host {host.name}"


@pytest.mark.dist
@pytest.mark.timeout(1200)  # launchers on a busy machine start in minutes
def test_pdsh_a_rank_killed_on_the_other_host_ends_the_job_and_the_same_command_goes_on(
    hosts: tuple[Host, Host], folder: Path, prepared: Path, expected: dict[int, float]
) -> None:
    a, b = hosts
    two = RunFolder(folder / "two")
    command = ["pdsh.sh", *RUN, "name=two", f"output={folder}", f"data.path={prepared}"]
    job = launch(a, folder, *command)
    wait_for_step(two, 11, job)  # the checkpoint of step 10 waits for that of step 5
    (rank_1,) = b.processes("train.py", without="deepspeed")
    os.kill(rank_1, signal.SIGKILL)
    (output,) = end(job)
    assert_all_ended(a, b)
    assert not two.is_done
    assert re.search(r"rank 1 on host b fell silent at step \d+", output), output
    assert two.status == "failed"
    assert two.records("failed")[-1]["host"] == "b"
    saved = read_manifest(find_checkpoint(two.path)).step
    assert saved >= 5

    (output,) = end(launch(a, folder, *command))
    assert two.is_done, output
    (resumed,) = two.records("resume")
    assert (resumed["step"], resumed["hosts"]) == (saved, {"a": [0], "b": [1]})
    assert losses(two.path) == pytest.approx(expected, rel=1e-5)
    assert_all_ended(a, b)


@pytest.mark.dist
@pytest.mark.timeout(1200)  # launchers on a busy machine start in minutes
def test_without_ssh_a_cut_wire_ends_both_sides(hosts: tuple[Host, Host], folder: Path, prepared: Path) -> None:
    """Each host's part is started by hand, with its number."""
    cut = RunFolder(folder / "cut")
    run = [*RUN, "name=cut", f"output={folder}", f"data.path={prepared}", "tokens=10M"]
    jobs = [launch(host, folder, "no_ssh.sh", str(number), *run) for number, host in enumerate(hosts)]
    wait_for_step(cut, 6, *jobs)
    hosts[1].wire("down")
    try:
        start = time.monotonic()
        outputs = end(*jobs)
        assert_all_ended(*hosts)
        took = time.monotonic() - start
    finally:
        hosts[1].wire("up")
    assert took < 100
    assert re.search(r"rank 1 on host b fell silent at step \d+: ", outputs[0]), outputs
    assert outputs[0].count("logs of all ranks: ") == 1
    assert cut.status == "failed"
