"""The same run goes on: what has to be as it was, what may change, and that it ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qatscale.config.recipe import load_run_config, resolved_yaml
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.components import ResumePlan
from qatscale.train.evaluate import evaluate_checkpoint
from qatscale.train.resume import as_begun, plan_resume
from qatscale.train.run import train
from tests.train.driving import SWITCH, assert_same_state, config, losses
from tests.train.trained_runs import REFERENCE, STOPPED_BF16, Trained


def plan(trained: Trained, name: str, *overrides: str, branch_from: str | None = None) -> ResumePlan | None:
    again = config(trained.spec(name, *trained.layout("z1", "m8")), *overrides)
    return plan_resume(again, build_timeline(again), branch_from)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate was 0.0003 and is now 0.001"),
        ("qat.bits=3", "qat.bits was 2 and is now 3"),
        ("seed=7", "seed was 0 and is now 7"),
        ("data.seed=7", "data.seed was 0 and is now 7"),
        ("schedule.shape=linear", "schedule.shape was '1-sqrt' and is now 'linear'"),
    ],
)
def test_another_configuration_is_refused_with_key_old_and_new_value(
    override: str, says: str, trained: Trained
) -> None:
    with pytest.raises(UserError) as caught:
        plan(trained, "unfinished", override)
    assert says in str(caught.value)
    assert "another name, or branch" in caught.value.fix


@pytest.mark.parametrize(
    ("timeline", "ratio"),
    [
        (None, 12 ** -(1 - 0.35 / 0.7)),
        ({"qat_lr_ratio": 0.8}, 0.8),
        ({}, 1.0),
        ({"qat_lr_ratio": None}, 12 ** -(1 - 0.35 / 0.7)),
    ],
    ids=["new", "recorded", "before ratios were recorded", "full precision before"],
)
def test_a_run_keeps_the_rate_that_it_began_with(timeline: dict[str, Any] | None, ratio: float, tmp_path: Path) -> None:
    """`auto` is a number from the start: a later version's rule must not change a run that is resumed."""
    overrides = [f"output={tmp_path}", "name=run", "qat.scheme=sequential", "qat.bits=2", "qat.fraction=0.35"]
    automatic = load_run_config("debug", overrides)
    if timeline is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text("{}")
        (tmp_path / "run" / "recipe.yaml").write_text(resolved_yaml(automatic))
        whole = {"steps": 20, "tokens_per_step": 512, "switch_step": None, "segments": []}
        (tmp_path / "run" / "timeline.json").write_text(json.dumps(whole | timeline))
    folder = RunFolder(tmp_path / "run")
    assert as_begun(automatic, folder).qat.lr_ratio == pytest.approx(ratio, rel=2e-3)
    given = load_run_config("debug", [*overrides, "qat.lr_ratio=0.3"])
    assert as_begun(given, folder).qat == given.qat


@pytest.mark.parametrize(("recorded", "version"), [("absent", 1), ("auto", 2), ("1", 1), ("2", 2)])
def test_a_run_keeps_the_initial_weights_that_it_began_with(recorded: str, version: int, tmp_path: Path) -> None:
    """Runs of versions that did not record `init` had the first generator; so has what their recipe reproduces."""
    config = load_run_config("debug", [f"output={tmp_path}", "name=run", "qat.scheme=fp"])
    assert as_begun(config, RunFolder(tmp_path / "run")).init == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    recipe = tmp_path / "run" / "recipe.yaml"
    line = "" if recorded == "absent" else f"init: {recorded}\n"
    recipe.write_text(resolved_yaml(config).replace("init: auto\n", line))
    assert as_begun(config, RunFolder(tmp_path / "run")).init == version
    again = load_run_config(recipe, ["name=again"])
    assert as_begun(again, RunFolder(tmp_path / "again")).init == version


@pytest.mark.dist
def test_several_differences_are_told_at_once(trained: Trained) -> None:
    with pytest.raises(UserError, match=r"tokens was 6144 and is now 8192; qat.bits was 2 and is now 4"):
        plan(trained, "unfinished", "tokens=8192", "qat.bits=4")


@pytest.mark.dist
def test_what_does_not_change_the_result_may_change(trained: Trained) -> None:
    as_it_was = plan(trained, "unfinished")
    assert as_it_was is not None
    assert (as_it_was.resumes, as_it_was.step, as_it_was.notices) == (True, SWITCH + 1, ())
    changes = {
        "engine.ds_config": "zero3_bf16", "batch.micro_batch": "2", "log_interval": "5", "checkpoint.interval": "1024",
        "checkpoint.keep": "9", "checkpoint.keep_at": "[512]", "evaluation.tokens": "64",
    }  # fmt: skip
    changed = plan(trained, "unfinished", *(f"{key}={value}" for key, value in changes.items()))
    assert changed is not None
    assert changed.step == SWITCH + 1
    for key in changes:
        assert sum(f"{key} was" in notice for notice in changed.notices) == 1


@pytest.mark.dist
def test_a_run_goes_on_under_another_layout(trained: Trained) -> None:
    """Stopped after the switch on 1 process under ZeRO-1, ended on 2 under ZeRO-3 with other micro-batches."""
    assert losses(trained.runs / "moved") == pytest.approx(losses(trained.runs / REFERENCE), rel=1e-5)
    (resumed,) = RunFolder(trained.runs / "moved").records("resume")
    assert resumed["step"] == SWITCH + 1
    for change in ("engine.ds_config was 'zero1_fp32' and is now 'zero3_fp32'", "batch.micro_batch was 8 and is now 2"):
        assert trained.output[2].count(f"note: changed for the rest of the run: {change}") == 1


@pytest.mark.dist
@pytest.mark.parametrize(("ds_config", "signalled"), STOPPED_BF16.items())
def test_one_process_gets_a_signal_and_all_stop_at_the_same_step(
    ds_config: str, signalled: int, trained: Trained
) -> None:
    """Rank 1 alone was signalled; the run went on afterwards, and ended bit for bit as the one that was not stopped."""
    stopped, whole = (RunFolder(trained.runs / name) for name in (f"{ds_config}-stopped", ds_config))
    (stop,) = stopped.records("stopped")
    assert (stop["step"], stop["signal"]) == (signalled + 2, "SIGUSR1")
    (resumed,) = stopped.records("resume")
    assert resumed["step"] == signalled + 2
    assert losses(stopped.path) == losses(whole.path)
    assert_same_state(find_checkpoint(stopped.path), find_checkpoint(whole.path))
    assert stopped.final is not None
    assert whole.final is not None
    assert stopped.final["final/val_loss"] == whole.final["final/val_loss"]


@pytest.mark.dist
def test_a_run_that_is_done_is_returned_as_it_is(trained: Trained) -> None:
    folder = RunFolder(trained.runs / REFERENCE)
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    outcome = train(config(trained.spec(REFERENCE, *trained.layout("z1", "m8"))))
    assert (outcome.status, outcome.final) == ("done", folder.final)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


@pytest.mark.dist
def test_a_run_that_is_done_is_not_taken_for_another(trained: Trained) -> None:
    with pytest.raises(UserError, match=r"qat.bits was 2 and is now 4"):
        train(config(trained.spec(REFERENCE, *trained.layout("z1", "m8")), "qat.bits=4"))


@pytest.mark.dist
def test_a_branch_goes_on_as_the_branch_it_is(trained: Trained) -> None:
    assert plan(trained, "branch", branch_from=f"{trained.runs}/trunk@{SWITCH}") is None, "done"
    with pytest.raises(UserError, match=rf"was branched from .*/trunk@{SWITCH}\."):
        plan(trained, "branch", branch_from=f"{trained.runs}/trunk@16")
    with pytest.raises(UserError, match="began fresh"):
        plan(trained, "unfinished", branch_from=f"{trained.runs}/trunk@{SWITCH}")


@pytest.mark.dist
def test_a_branch_without_a_checkpoint_of_its_own_starts_again_where_it_branched(
    tmp_path: Path, trained: Trained
) -> None:
    unsaved = shutil.ignore_patterns("step-*", "done.json")
    shutil.copytree(trained.runs / "branch", tmp_path / "branch", ignore=unsaved)
    start = plan(trained, "branch", f"output={tmp_path}")
    assert start is not None
    assert start.resumes
    assert start.checkpoint == find_checkpoint(f"{trained.runs}/trunk@{SWITCH}").resolve()


@pytest.mark.dist
def test_runs_of_a_version_with_another_order_of_data(tmp_path: Path, trained: Trained) -> None:
    """They are read and branched from; what could only go on in another order is not resumed."""
    for name in ("unfinished", REFERENCE):
        shutil.copytree(trained.runs / name, tmp_path / name)
        recipe = tmp_path / name / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("data:\n", "data:\n  shuffle_block: 65536\n"))
    former = f"output={tmp_path}"
    assert evaluate_checkpoint(str(tmp_path / REFERENCE))[1:] == evaluate_checkpoint(str(trained.runs / REFERENCE))[1:]
    assert plan(trained, REFERENCE, former) is None, "done"
    with pytest.raises(UserError, match="in another order") as caught:
        plan(trained, "unfinished", former)
    assert "branch" in caught.value.fix
    for runs, notices in ((tmp_path, 1), (trained.runs, 0)):
        branch = plan(trained, "new", former, branch_from=str(runs / "unfinished"))
        assert branch is not None
        assert sum("another order of data" in notice for notice in branch.notices) == notices
