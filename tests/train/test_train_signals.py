"""`qatscale train`: stopped by a signal and started again, or ended by an error."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qatscale.engine.checkpoints.files import read_manifest
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.errors import EXIT_FAILED, EXIT_REQUEUE
from qatscale.tracking.run_folder import RunFolder
from tests.processes import unlaunched
from tests.train.driving import assert_same_state, losses
from tests.train.trained_runs import Trained

QATSCALE = Path(sys.executable).with_name("qatscale")
LONG = "long"
"""24 steps, so that there is time to signal; the run that is not stopped is one of `trained`."""


def start(trained: Trained, name: str, *overrides: str) -> subprocess.Popen[str]:
    """The real command, in an environment without a launcher's variables."""
    command = [sys.executable, QATSCALE, "train", "debug", *trained.spec(name, *overrides)["overrides"]]
    return subprocess.Popen(command, env=unlaunched(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if (folder / "metrics.jsonl").exists() and max(losses(folder), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


@pytest.fixture(scope="module")
def diverging(trained: Trained) -> subprocess.Popen[str]:
    """A run at an absurd rate; it has a core to itself while the other test goes on."""
    return start(trained, "diverged", "optimizer.learning_rate=1e6", "optimizer.gradient_clipping=0")


@pytest.mark.dist
@pytest.mark.usefixtures("diverging")
def test_sigterm_saves_and_the_same_command_goes_on(trained: Trained) -> None:
    folder = RunFolder(trained.runs / "signalled")
    process = start(trained, "signalled", *trained.long)
    wait_for_step(folder.path, 2, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == EXIT_REQUEUE == 75, output
    (stopped,) = folder.records("stopped")
    assert stopped["signal"] == "SIGTERM"
    assert 2 <= stopped["step"] < 24
    manifest = read_manifest(find_checkpoint(folder.path))
    assert (manifest.step, manifest.reason) == (stopped["step"], "signal")
    assert folder.status == "stopped"
    assert f"SIGTERM: saved at step {stopped['step']}; the same command continues from there" in output

    process = start(trained, "signalled", *trained.long)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert f"from step {stopped['step']}: " in output
    assert losses(folder.path) == losses(trained.runs / LONG)
    assert list(losses(folder.path)) == list(range(1, 25))
    assert_same_state(find_checkpoint(folder.path), find_checkpoint(trained.runs / LONG))


@pytest.mark.dist
def test_a_run_that_diverges_ends_with_an_error_that_is_on_record(
    diverging: subprocess.Popen[str], trained: Trained
) -> None:
    output = diverging.communicate(timeout=100)[0]
    assert diverging.returncode == EXIT_FAILED, output
    folder = RunFolder(trained.runs / "diverged")
    assert folder.status == "failed"
    failed = folder.records("failed")[-1]
    assert failed["error"].startswith("the ")
    assert "Lower optimizer.learning_rate" in failed["error"]
    log = (folder.logs / "rank-0.log").read_text()
    assert "Traceback" in log
    assert failed["error"] in log
    assert failed["error"] in output
    assert "Traceback" not in output
    assert not folder.is_done
