"""Whose failure a job tells (pure), and that it does so in time when a rank of a real job hangs or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qatscale.cli.broken_pipe import IgnoreBrokenPipe
from qatscale.engine.checkpoints.files import read_manifest
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.engine.runtime import Runtime
from qatscale.errors import EXIT_FAILED
from qatscale.supervise.failure_report import (
    Failure,
    Kind,
    first_failure,
    is_consequence,
    job_failures,
    report,
    stragglers,
)
from qatscale.supervise.process import LauncherProcesses
from qatscale.supervise.watchdog import Watchdog, in_communication
from qatscale.tracking.run_folder import RunFolder
from tests import processes

FAULTY = Path(__file__).with_name("faulty.py")


def failure(rank: int, kind: Kind, time: float = 0.0, text: str = "") -> Failure:
    return Failure(rank, "abcd"[rank // 2], 17, time, kind, f"{kind} of {rank}", text)


def test_a_clock_that_jumps_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine that was suspended: the clock jumps by half an hour, and the main thread goes on at once."""
    watchdog = Watchdog(Runtime(0, 1, torch.device("cpu")), tmp_path, stall_timeout=600)
    watchdog.progress(7)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2100)
    assert not watchdog._must_end()
    watchdog.progress(8)
    assert not watchdog._must_end()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2800)
    assert [watchdog._must_end() for _ in range(2)] == [False, True], "a hang is one still when it is looked at again"


def heartbeat(rank: int, own: Failure | None = None, seen: Failure | None = None, **more: Any) -> dict[str, Any]:
    standing = {"rank": rank, "step": 17, "waits": False, "collectives": 100} | more
    return standing | {"failure": own and asdict(own), "seen": seen and asdict(seen)}


def test_a_cause_goes_before_its_consequences_and_then_the_earliest() -> None:
    ranked = [
        failure(3, "error", 5),
        failure(2, "error", 6),
        failure(7, "fault", 1),
        failure(1, "gone", 1),
        failure(4, "silent", 0),
    ]
    ranked += [failure(0, "stalled", 0), failure(5, "consequence", 2), failure(6, "witness", 0)]
    for cut in range(len(ranked)):
        assert first_failure(list(reversed(ranked[cut:]))) == ranked[cut]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/…] Connection closed by peer [10.77.0.2]:21432"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("CUDA out of memory"), False),
        (FloatingPointError("the loss is nan"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_is_only_a_consequence(error: BaseException, expected: bool) -> None:
    assert is_consequence(error) is expected


def test_who_holds_the_others_up() -> None:
    waiting = [heartbeat(rank, waits=True) for rank in range(3)]
    assert stragglers([*waiting, heartbeat(3, collectives=99)]) == [3]
    assert stragglers([*waiting, heartbeat(3, waits=True, collectives=99)]) == [3], "it has entered one less"
    assert stragglers([*waiting, heartbeat(3, waits=True, step=16)]) == [3], "a step behind"
    assert stragglers(waiting) == [0, 1, 2], "nothing tells them apart"


def test_a_stack_in_a_collective_is_told_from_one_in_the_loop() -> None:
    site = "/lib/site-packages"
    wait = [f"{site}/torch/distributed/distributed_c10d.py", f"{site}/deepspeed/comm/torch.py"]
    loop = ["/qatscale/data/reader.py", "/qatscale/train/loop.py"]
    assert in_communication([*wait, *loop])
    assert not in_communication(loop)


def test_own_words_count_more_than_what_others_saw_and_the_silent_are_named() -> None:
    saw = failure(1, "gone", 3)
    cause, late = failure(1, "error", 4), failure(0, "consequence", 4.1)
    assert first_failure(job_failures([heartbeat(0, late, saw), heartbeat(1, cause)], {})) == cause
    assert first_failure(job_failures([heartbeat(0, late, saw)], {1: failure(1, "silent", 9)})) == saw
    assert first_failure(job_failures([heartbeat(0, late)], {1: failure(1, "silent", 9)})) == failure(1, "silent", 9)
    assert first_failure(job_failures([heartbeat(0, late), heartbeat(1, failure(1, "consequence", 4))], {})).rank == 1


def test_who_hangs_is_found_among_those_that_answer() -> None:
    answers = [heartbeat(rank, failure(rank, "witness"), waits=rank != 2) for rank in range(4)]
    found = first_failure(job_failures(answers, {}))
    assert (found.rank, found.kind) == (2, "stalled")


def test_the_message_ends_with_the_first_failure_whole() -> None:
    trace = "Traceback (most recent call last):\n  File …\nValueError: no"
    cause = Failure(3, "b", 17, 5.0, "error", "ValueError: no", trace)
    told = report([failure(0, "consequence", 4), cause], "runs/x/logs")
    assert trace in told
    assert "consequence of 0" not in told
    assert told.splitlines()[-2:] == [
        "rank 3 on host b failed at step 17: ValueError: no",
        "logs of all ranks: runs/x/logs; the same command continues from the newest checkpoint",
    ]
    full = report([replace(cause, kind="fault", error="a/b: No space left. Free some.")], "runs/x/logs")
    assert full.splitlines()[1:] == [
        "rank 3 on host b failed at step 17: a/b: No space left. Free some.",
        "logs of all ranks: runs/x/logs",
    ]
    cut = report([failure(2, "silent", 1), failure(3, "silent", 2)], "logs").splitlines()
    assert [line.partition(" at ")[0] for line in cut[1:3]] == [
        "rank 2 on host b fell silent", "rank 3 on host b fell silent"
    ]  # fmt: skip


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_a_rank_that_hangs_and_one_that_dies_end_the_job_and_the_same_command_goes_on(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [FAULTY, "debug", "name=run", f"output={tmp_path}", f"data.path={prepared}", "tracking.uri=none"]
    arguments += ["checkpoint.interval=1280", "engine.stall_timeout=8"]  # every 5 steps
    run = RunFolder(tmp_path / "run")

    def ended(fault: str) -> tuple[list[int | None], list[str]]:
        monkeypatch.setenv("FAULT", fault)
        job = processes.start(arguments, 2)
        try:
            outputs = [process.communicate(timeout=400)[0] for process in job]
        finally:
            for process in job:
                process.kill()
        return [process.returncode for process in job], outputs

    codes, (first, second) = ended("sleep:1:12")
    told_at = time.time()
    assert codes == [EXIT_FAILED, EXIT_FAILED], first + second
    host = run.records("start")[0]["process"]["host"]
    assert f"rank 1 on host {host} hung at step 12: no progress for " in first
    assert "time.sleep(3600)" in first, "the stack of who hangs"
    assert "hung at step" not in second, "one process tells it"
    log = (run.logs / "rank-1.log").read_text()
    assert f"Z {host} rank 1 ERROR qatscale: " in log
    assert "time.sleep(3600)" in log
    (failed,) = run.records("failed")
    assert (failed["rank"], failed["step"], failed["host"]) == (1, 12, host)
    last = run.records("metrics")[-1]
    assert last["step"] == 12
    assert told_at - last["time"] < 8 + 2 + 3 + 10 + 30, "stall, notice, last words, gather; and a busy machine"
    assert read_manifest(find_checkpoint(run.path)).step == 10

    codes, (first, second) = ended("kill:1:22")
    assert codes[0] == EXIT_FAILED
    assert f"rank 1 on host {host} died at step 22: its process ended without a word" in first, first
    assert [record["step"] for record in run.records("resume")] == [10]
    assert read_manifest(find_checkpoint(run.path)).step in (15, 20), "that of step 20 waits for that of step 15"
    assert run.status == "failed"


def test_a_launcher_that_is_gone_is_noticed(tmp_path: Path) -> None:
    """A command named `deepspeed` with a child, as the single-node runner has its launcher: SIGTERM ends it alone."""
    command = tmp_path / "deepspeed"
    command.write_text("#!/bin/sh\nsleep 60 &\necho $!\nwait\n")
    command.chmod(0o755)
    with subprocess.Popen([command], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        try:
            of_child = LauncherProcesses(child)
            assert not of_child.gone()
            assert not LauncherProcesses(launcher.pid).gone(), "whoever started the launcher may leave it alone"
            launcher.terminate()
            launcher.wait()
            assert of_child.gone()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lost_ssh_session_is_noticed(tmp_path: Path) -> None:
    """sshd's session starts a shell for DeepSpeed's launcher; when the connection is lost, the session alone ends."""
    session = tmp_path / "session"
    session.write_text("#!/bin/sh\nsh -c 'sleep 60 & echo $!; wait; : deepspeed.launcher.launch' &\nwait\n")
    session.chmod(0o755)
    with subprocess.Popen([session], stdout=subprocess.PIPE, text=True) as sshd:
        assert sshd.stdout is not None
        child = int(sshd.stdout.readline())
        try:
            of_child = LauncherProcesses(child)
            assert not of_child.gone()
            sshd.kill()
            sshd.wait()
            assert of_child.gone()
        finally:
            os.kill(child, signal.SIGKILL)


def test_output_outlives_its_reader() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as pipe:
        stream = IgnoreBrokenPipe(pipe)
        print("read", file=stream)
        assert os.read(reader, 100) == b"read\n"
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            print("not read", file=pipe)
        print("not read", file=stream, flush=True)
        assert stream.encoding == pipe.encoding
        with suppress(OSError):
            pipe.close()  # what it still holds


def test_the_watchdog_process_ends_a_process_that_is_stopped() -> None:
    code = "import time; from qatscale.supervise.process import WatchdogProcess; w = WatchdogProcess(1.0)\n"
    code += "print(flush=True)\nwhile 1: w.alive()"
    with subprocess.Popen([sys.executable, "-c", code + "; time.sleep(0.1)"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1.5)
        assert process.poll() is None, "it gives signs of life"
        process.send_signal(signal.SIGSTOP)
        assert process.wait(timeout=30) == -signal.SIGKILL


def test_a_job_that_is_stopped_with_its_launcher_is_not_killed() -> None:
    """Ctrl-Z and fg."""
    code = "import time; from qatscale.supervise.process import WatchdogProcess; w = WatchdogProcess(0.6)\n"
    code += "print(flush=True)\nfor _ in range(15): w.alive(); time.sleep(0.1)"
    launcher = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {code!r}]).returncode)"
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, start_new_session=True) as job:
        assert job.stdout is not None
        job.stdout.readline()
        os.killpg(job.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.killpg(job.pid, signal.SIGCONT)
        assert job.wait(timeout=60) == 0


PAUSED = """
import sys, time
from pathlib import Path
import torch
from qatscale.engine.runtime import Runtime
from qatscale.supervise import watchdog
watchdog.SLOW = 0.0
with watchdog.Watchdog(Runtime(0, 1, torch.device("cpu")), Path(sys.argv[1]), stall_timeout=2.0) as watched:
    watched.progress(1)
    print(flush=True)
    sys.stdin.readline()
    for _ in range(20):  # longer than the watchdog waits after an alarm before it ends the process
        watched.progress(2)
        time.sleep(0.2)
"""


@pytest.mark.dist
def test_a_process_that_was_stopped_and_continued_is_not_taken_for_one_that_hangs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PAUSED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.8)  # the watchdog looks before the main thread gets on
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == 0
