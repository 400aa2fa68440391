"""`qatscale train`: stopped by a signal and started again, or ended by an error."""

from __future__ import annotations

import pytest

from qatscale.engine.checkpoints.files import read_manifest
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.errors import EXIT_FAILED, EXIT_REQUEUE
from qatscale.tracking.run_folder import RunFolder
from tests.processes import Python
from tests.train.driving import assert_same_state, losses
from tests.train.trained_runs import Trained

LONG = "long"
"""24 steps; the run that is not stopped is one of `trained`."""
SIGNALLED = """
import os, signal, sys
from qatscale.data.reader import BatchReader
own = BatchReader.batch
def batch(self, step, *rest):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return own(self, step, *rest)
BatchReader.batch = batch
from qatscale.cli import main
main(sys.argv[1:])
"""
"""`qatscale` that gets SIGTERM before its fourth step."""


def command(trained: Trained, name: str, *overrides: str) -> list[str]:
    return ["train", "debug", *trained.spec(name, *overrides)["overrides"]]


@pytest.mark.dist
def test_sigterm_saves_and_the_same_command_goes_on(trained: Trained) -> None:
    folder = RunFolder(trained.runs / "signalled")
    train = command(trained, "signalled", *trained.long)
    process = Python(["-c", SIGNALLED, *train])
    output = process.communicate(timeout=500)[0]
    assert process.returncode == EXIT_REQUEUE == 75, output
    (stopped,) = folder.records("stopped")
    assert stopped["signal"] == "SIGTERM"
    assert 3 <= stopped["step"] < 24
    manifest = read_manifest(find_checkpoint(folder.path))
    assert (manifest.step, manifest.reason) == (stopped["step"], "signal")
    assert folder.status == "stopped"
    assert f"SIGTERM: saved at step {stopped['step']}; the same command continues from there" in output

    process = Python(["-m", "qatscale", *train])
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    assert f"from step {stopped['step']}: " in output
    assert losses(folder.path) == losses(trained.runs / LONG)
    assert list(losses(folder.path)) == list(range(1, 25))
    assert_same_state(find_checkpoint(folder.path), find_checkpoint(trained.runs / LONG))


@pytest.mark.dist
def test_a_run_that_diverges_ends_with_an_error_that_is_on_record(trained: Trained) -> None:
    absurd = ["optimizer.learning_rate=1e6", "optimizer.gradient_clipping=0"]
    process = Python(["-m", "qatscale", *command(trained, "diverged", *absurd)])
    output = process.communicate(timeout=500)[0]
    assert process.returncode == EXIT_FAILED, output
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
