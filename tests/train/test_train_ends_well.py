"""A run ends well at any moment: signals outside the loop, a second start, failed checks, values that are NaN."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from qatscale.config.recipe import load_run_config
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.engine.runtime import free_port
from qatscale.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_REQUEUE, UserError
from qatscale.export.source import open_source
from qatscale.schedule.build import build_timeline
from qatscale.study.folder import StudyFolder
from qatscale.study.lay_out import lay_out
from qatscale.supervise.signals import catch
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.resume import plan_resume
from tests.processes import Python, unlaunched
from tests.study.studies import write_study
from tests.train.driving import STEPS, SWITCH, losses, spec
from tests.train.fixed_tokens import write_fixed_tokens

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fixed_tokens(tmp_path_factory.mktemp("tokens") / "data")


def command(folder: Path, data: Path, *overrides: str) -> list[str]:
    """`train debug …` for a run in `folder`."""
    return ["train", "debug", *spec(folder.name, folder.parent, data, *overrides)["overrides"]]


def finish(process: Python) -> tuple[int, str]:
    output = process.communicate(timeout=500)[0]
    return process.wait(), output


SIGNALLED = """
import os, signal, sys
module, owner, method = sys.argv[1].split(":")
owner = getattr(__import__(module, fromlist=[owner]), owner) if owner else __import__(module, fromlist=[method])
own = getattr(owner, method)
def signalled(*arguments, **keywords):
    os.kill(os.getpid(), signal.Signals[sys.argv[2]])
    return own(*arguments, **keywords)
setattr(owner, method, signalled)
from qatscale.cli import main
main(sys.argv[3:])
"""
"""`qatscale` with a signal at each call of a function."""
BEFORE, AFTER = (
    ("qatscale.supervise.claims:Claims:held", "qatscale.train.run::build"),
    "qatscale.data.reader:EvaluationReader:batch",
)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_a_signal_before_the_first_step_or_in_the_final_evaluation(
    name: str, code: int, data: Path, tmp_path: Path
) -> None:
    """Also while it watches the heartbeat of a claim that it cannot read."""
    train = command(tmp_path / "run", data)
    (writers := tmp_path / "run/writers").mkdir(parents=True)
    if name != "SIGHUP":
        (writers / "writer~0001.json").touch()
    ended, output = finish(Python(["-c", SIGNALLED, BEFORE[name == "SIGHUP"], name, *train]))
    assert ended == code, output
    assert f"{name}: stopped before the first step" in output
    shutil.rmtree(writers)
    ended, output = finish(Python(["-c", SIGNALLED, AFTER, name, *train]))
    assert ended == code, output
    folder = RunFolder(tmp_path / "run")
    assert (folder.status, folder.records("stopped")[-1]["step"]) == ("stopped", STEPS)
    if name == "SIGTERM":
        ended, output = finish(Python(["-m", "qatscale", *train]))
        assert ended == 0, output
        assert folder.is_done


def test_a_signal_while_the_command_starts(data: Path, tmp_path: Path) -> None:
    at = "qatscale.config.recipe::load_run_config"
    ended, output = finish(Python(["-c", SIGNALLED, at, "SIGTERM", *command(tmp_path / "run", data)]))
    assert ended == EXIT_REQUEUE, output
    assert not (tmp_path / "run").exists()
    for place, words in (
        ("qatscale.study.file::read_study", ["study", "run", "s.yaml"]),
        ("qatscale.cli.quickstart::prepare_corpus", ["quickstart", str(tmp_path / "quick")]),
    ):
        ended, output = finish(Python(["-c", SIGNALLED, place, "SIGHUP", *words]))
        assert ended == EXIT_REQUEUE, output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_before_a_workers_run_starts_gives_the_run_back(name: str, data: Path, tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study")
    lay_out(write_study(tmp_path / "s.yaml", data, bits="[4]", fractions="[0.5]", schemes="[fused]"), study)
    at = "qatscale.study.worker:Worker:_train_here"
    ended, output = finish(Python(["-c", SIGNALLED, at, name, "study", "work", str(study.path)]))
    assert ended == EXIT_REQUEUE, output
    assert [attempt.state for attempt in study.claims.attempts().values()] == ["released"]
    assert not study.runs.exists()


def test_nohup_holds_for_studies_too() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        former = catch(lambda *_: None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number, handler in former.items():
            signal.signal(number, handler)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_start_that_waits_for_a_process_that_never_comes_ends_at_once(data: Path, tmp_path: Path) -> None:
    port = free_port()
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = Python(["-m", "qatscale", *command(tmp_path / "run", data)], unlaunched() | job)
    while process.poll() is None and not listens(process.pid, port):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_REQUEUE, output


def listens(pid: int, port: int) -> bool:
    """Whether a process takes connections: where the others of its job would meet it."""
    return any(one.laddr.port == port and one.status == "LISTEN" for one in psutil.Process(pid).net_connections())


HELD = """
import sys, time
from pathlib import Path
from qatscale.data.reader import BatchReader
own = BatchReader.batch
def held(self, step, *rest):
    while step == 2 and not Path(sys.argv[1]).exists():
        time.sleep(0.01)
    return own(self, step, *rest)
BatchReader.batch = held
from qatscale.cli import main
main(sys.argv[2:])
"""
"""`qatscale` that goes on after two steps when a file is there."""


def test_of_two_equal_commands_at_once_one_trains(data: Path, tmp_path: Path) -> None:
    both = [Python(["-c", HELD, tmp_path / "go", *command(tmp_path / "run", data)]) for _ in range(2)]
    while all(one.poll() is None for one in both):
        time.sleep(0.05)
    (tmp_path / "go").touch()
    outputs = dict(map(finish, both))
    assert sorted(outputs) == [0, EXIT_BAD_INPUT], outputs
    assert "is being trained by process" in outputs[EXIT_BAD_INPUT]
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


def test_a_verdict_stays_with_the_run(data: Path, tmp_path: Path) -> None:
    """Adam's epsilon is so large that nothing moves: a check that failed at the end fails again."""
    train = command(tmp_path / "run", data, "optimizer.eps=1e300")
    for _ in range(2):
        ended, output = finish(Python(["-m", "qatscale", *train]))
        assert ended == EXIT_FAILED, output
        assert "have not moved since the switch" in output
        assert "Traceback" not in output
    assert not RunFolder(tmp_path / "run").is_done
    with pytest.raises(UserError, match=r"its run failed: the scales of .* have not moved"):
        open_source(str(tmp_path / "run"))
    recipe = tmp_path / "run/recipe.yaml"
    longer = [f"tokens={2 * load_run_config(recipe).tokens}", f"qat.fraction={1 - SWITCH / (2 * STEPS)}"]
    config = load_run_config(recipe, ["name=branch", *longer])
    branch = plan_resume(config, build_timeline(config), str(tmp_path / "run"))
    assert branch is not None
    assert any("the parent failed: the scales of" in notice for notice in branch.notices)


EARLY = """
import sys
import qatscale.train.loop
qatscale.train.loop.SCALES_MOVE_WITHIN = 2
from qatscale.cli import main
main(sys.argv[1:])
"""
"""`qatscale` that looks at the scales two steps after the switch."""


def test_scales_that_do_not_move_are_found_soon_after_the_switch(data: Path, tmp_path: Path) -> None:
    ended, output = finish(Python(["-c", EARLY, *command(tmp_path / "run", data, "optimizer.eps=1e300")]))
    assert ended == EXIT_FAILED, output
    assert "have not moved since the switch" in output
    assert max(losses(tmp_path / "run")) == SWITCH + 2 < STEPS


POISONED = """
import sys, torch
from qatscale.train.checkpointing import AsyncCheckpointer
save = AsyncCheckpointer.save
def poisoned(self, step, reason):
    masters = self._components.masters
    if step == int(sys.argv[1]):
        next(iter(masters.by_partition())).data[3] = torch.nan
    save(self, step, reason)
AsyncCheckpointer.save = poisoned
from qatscale.cli import main
main(sys.argv[2:])
"""
"""`qatscale` with a weight that turns NaN in the update before a save."""


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_state_that_is_not_finite_is_never_a_checkpoint(background: str, data: Path, tmp_path: Path) -> None:
    more = ["checkpoint.interval=512", f"checkpoint.background={background}"]
    train = command(tmp_path / "run", data, *more)
    ended, output = finish(Python(["-c", POISONED, "9", *train]))
    assert ended == EXIT_FAILED, output
    assert "the checkpoint of step 9 was not written: weight/" in output
    assert find_checkpoint(tmp_path / "run").name == "step-00000008"
    ended, output = finish(Python(["-m", "qatscale", *train]))
    assert ended == 0, output
