"""Upload to a real MLflow on SQLite: everything is there, under its name, once."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service import utils

from qatlaw.run_folders import flatten
from qatscale.tracking.mlflow_page import points
from qatscale.tracking.mlflow_sync import TrackingError, Uploader, track_sync
from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.store import Cursor
from tests.tracking.synthetic_runs import MakeRun, finish, log_metrics


def runs_of(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("qatscale")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of all points of a metric, in order."""
    return sorted((m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, key))


def written(folder: RunFolder, field: str) -> list[tuple[int, float]]:
    return [(r["step"], r[field]) for r in folder.records("metrics")]


def a_done_run(make_run: MakeRun, name: str = "run", **settings: object) -> RunFolder:
    folder = make_run(name, scheme="fused", bits=2, steps=200, switch=100, cooldown=40, **settings)
    folder.append("start", step=0)
    log_metrics(folder, 0, 200)
    folder.append("switch", step=100, report={"layers": 14, "bits_per_weight": 2.03})
    (folder.figures / "timeline.png").write_bytes(b"png")
    finish(folder, {"fp": 2.75, "quantized": 2.5, "ptq4": 2.625})
    return folder


def test_a_done_run_is_there_whole_and_stays_so(make_run: MakeRun, sqlite: str, tmp_path: Path) -> None:
    folder = a_done_run(make_run)
    run_id = track_sync(folder, sqlite)
    assert track_sync(folder) == run_id, "the store is remembered, and a second upload changes nothing"
    (run,) = runs_of(sqlite)
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run", "FINISHED")

    # metrics, by name and step
    for key, field in {
        "train/loss": "loss",
        "train/learning_rate": "learning_rate",
        "train/grad_norm": "grad_norm",
        "train/tokens": "tokens",
        "perf/tokens_per_second": "tokens_per_second",
        "perf/tflops": "tflops",
        "perf/memory_gib": "memory_gib",
        "perf/data_seconds": "data_seconds",
    }.items():
        assert history(sqlite, run_id, key) == written(folder, field), key
    assert history(sqlite, run_id, "perf/mfu") == [], "an unknown peak is not a number"
    assert history(sqlite, run_id, "val/loss_fp") == [(200, 2.75)]
    assert history(sqlite, run_id, "val/loss_quantized") == [(200, 2.5)]
    assert history(sqlite, run_id, "val/perplexity_ptq4") == [(200, math.exp(2.625))]
    assert {k: run.data.metrics[k] for k in ("final/val_loss", "final/val_loss_fp_view", "final/val_loss_ptq4")} == {
        "final/val_loss": 2.5, "final/val_loss_fp_view": 2.75, "final/val_loss_ptq4": 2.625,
    }  # fmt: skip
    assert (run.data.metrics["n_params"], run.data.metrics["bits"], run.data.metrics["switch_step"]) == (1e6, 2, 100)
    first = next(m for m in MlflowClient(sqlite).get_metric_history(run_id, "train/loss") if m.step == 10)
    assert first.timestamp == int(folder.records("metrics")[0]["time"] * 1000)

    # parameters and tags
    assert run.data.params["qat.scheme"] == run.data.params["scheme"] == run.data.tags["scheme"] == "fused"
    assert run.data.params["model.hidden_size"] == str(folder.recipe["model"]["hidden_size"])
    assert run.data.params["optimizer.betas"] == json.dumps(folder.recipe["optimizer"]["betas"])
    assert not any(key.startswith("tracking") for key in run.data.params)
    assert (run.data.tags["bits"], run.data.tags["phase"], run.data.tags["switch_step"]) == ("2", "qat_cooldown", "100")
    assert run.data.tags["run_status"] == "done"
    assert run.data.tags.get("git_commit") == folder.run["git_commit"]

    # artifacts, beside the database
    client = MlflowClient(sqlite)
    assert {a.path for a in client.list_artifacts(run_id)} == {
        "recipe.yaml", "ds_config.json", "run.json", "environment.json", "timeline.json",
        "switch_report.json", "figures",
    }  # fmt: skip
    assert [a.path for a in client.list_artifacts(run_id, "figures")] == ["figures/timeline.png"]
    kept = list((tmp_path / "store" / "mlartifacts").rglob("recipe.yaml"))
    assert [yaml.safe_load(path.read_text()) for path in kept] == [folder.recipe]
    report = json.loads(next((tmp_path / "store" / "mlartifacts").rglob("switch_report.json")).read_text())
    assert report == {"step": 100, "report": {"layers": 14, "bits_per_weight": 2.03}}
    assert not (tmp_path / "store" / "mlruns").exists()


@pytest.mark.parametrize("lost", ["tracking.json", "offset"])
def test_what_was_sent_but_not_remembered_is_not_there_twice(make_run: MakeRun, sqlite: str, lost: str) -> None:
    """As after an answer that got lost, or a kill between MLflow's answer and the writing of the cursor."""
    folder = a_done_run(make_run)
    run_id = track_sync(folder, sqlite)
    if lost == "tracking.json":
        folder.tracking_file.unlink()
    else:
        cursor = Cursor.load(folder)
        assert cursor is not None
        cursor.offset, cursor.described, cursor.status = 0, False, None
        cursor.save(folder)
    assert track_sync(folder, sqlite) == run_id
    assert len(runs_of(sqlite)) == 1
    assert history(sqlite, run_id, "train/loss") == written(folder, "loss")
    assert history(sqlite, run_id, "final/val_loss") == [(200, 2.5)]


def test_a_run_that_grows_is_uploaded_piece_by_piece(make_run: MakeRun, sqlite: str) -> None:
    folder = make_run(steps=400)
    uploader = Uploader(folder, sqlite)
    assert uploader.sync() is False
    assert runs_of(sqlite)[0].info.status == "RUNNING"
    folder.append("start", step=0)
    for first in range(0, 400, 100):
        log_metrics(folder, first, first + 100)
        assert uploader.sync() is False
        assert history(sqlite, uploader.cursor.run_id or "", "train/loss") == written(folder, "loss")
    with folder.metrics_file.open("ab") as file:
        file.write(b'{"event": "metr')  # as one sees it in the middle of a write
    assert uploader.sync() is False
    assert history(sqlite, uploader.cursor.run_id or "", "train/loss") == written(folder, "loss")


def test_more_than_one_batch_of_metrics_and_parameters(make_run: MakeRun, sqlite: str) -> None:
    """MLflow takes 1,000 metrics and 100 parameters in a request."""
    folder = make_run(steps=400)
    folder.append("start", step=0)
    log_metrics(folder, 0, 400, interval=1)
    recipe = folder.recipe | {"many": {f"key{i}": i for i in range(250)}, "long": "x" * 7000}
    (folder.path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder.append("stopped", step=400, signal="SIGTERM")
    run_id = track_sync(folder, sqlite)
    assert history(sqlite, run_id, "train/loss") == written(folder, "loss")
    parameters = MlflowClient(sqlite).get_run(run_id).data.params
    assert parameters["many.key249"] == "249"
    assert parameters["long"] == "x" * 5999 + "…"
    assert runs_of(sqlite)[0].info.status == "KILLED"


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(make_run: MakeRun, sqlite: str) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    log_metrics(folder, 0, 60)
    folder.append("stopped", step=60, signal="SIGTERM")
    run_id = track_sync(folder, sqlite)
    assert MlflowClient(sqlite).get_run(run_id).info.status == "KILLED"

    # the same losses come again, as they do bit for bit in training; steps 50 and 60 were uploaded already
    folder.append("resume", step=40)
    log_metrics(folder, 40, 100)
    track_sync(folder)
    assert MlflowClient(sqlite).get_run(run_id).info.status == "RUNNING"
    finish(folder, {"fp": 2.5})
    assert track_sync(folder) == run_id
    (run,) = runs_of(sqlite)
    assert run.info.status == "FINISHED"
    assert history(sqlite, run_id, "train/loss") == written(folder, "loss")


def test_points_that_a_resume_superseded_before_they_were_sent_arrive_when_they_come_again(
    make_run: MakeRun, sqlite: str
) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    log_metrics(folder, 0, 60)
    folder.append("resume", step=40)
    track_sync(folder, sqlite)  # steps 50 and 60 are superseded, and not sent
    log_metrics(folder, 40, 100)
    run_id = track_sync(folder)  # as another process
    assert history(sqlite, run_id, "train/loss") == written(folder, "loss")


def test_a_resumed_run_that_differs_shows_both_points(make_run: MakeRun, sqlite: str) -> None:
    """MLflow takes no point back. The records do: they say what the run is."""
    folder = make_run(steps=100)
    folder.append("start", step=0)
    folder.append("metrics", step=10, loss=3.0, phase="stable")
    folder.append("stopped", step=10, signal="SIGTERM")
    run_id = track_sync(folder, sqlite)
    folder.append("resume", step=0)
    folder.append("metrics", step=10, loss=2.5, phase="stable")
    track_sync(folder)
    assert history(sqlite, run_id, "train/loss") == [(10, 2.5), (10, 3.0)]
    assert written(folder, "loss") == [(10, 2.5)]


@pytest.mark.parametrize("first", ["trunk", "branch"])
def test_a_branch_is_a_child_of_its_trunk(make_run: MakeRun, sqlite: str, first: str) -> None:
    trunk = make_run("trunk", steps=100)
    trunk.append("start", step=0)
    branch = make_run("branch", steps=100, cooldown=20, parent=(trunk, 80))
    branch.append("start", step=80)
    order = [trunk, branch] if first == "trunk" else [branch, trunk, branch]
    ids = {folder.name: track_sync(folder, sqlite) for folder in order}
    tags = MlflowClient(sqlite).get_run(ids["branch"]).data.tags
    assert tags["mlflow.parentRunId"] == ids["trunk"]
    assert (tags["parent"], tags["parent_step"]) == ("trunk", "80")


def test_a_branch_whose_trunk_is_gone_is_uploaded_all_the_same(make_run: MakeRun, sqlite: str) -> None:
    trunk = make_run("trunk", steps=100)
    branch = make_run("branch", steps=100, parent=(trunk, 80))
    branch.append("start", step=80)
    trunk.run_file.unlink()
    tags = MlflowClient(sqlite).get_run(track_sync(branch, sqlite)).data.tags
    assert tags["parent"] == "trunk"
    assert "mlflow.parentRunId" not in tags


def test_losses_that_are_not_finite_arrive(make_run: MakeRun, sqlite: str) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    for step, loss in ((1, 2.0), (2, math.nan), (3, math.inf)):
        folder.append("metrics", step=step, loss=loss, phase="stable")
    points_there = history(sqlite, track_sync(folder, sqlite), "train/loss")
    assert points_there[0] == (1, 2.0)
    assert math.isnan(points_there[1][1])
    assert points_there[2] == (3, sys.float_info.max), "MLflow's SQL stores keep infinity as the largest float"


def test_a_store_may_move_with_its_run_again_and_again(make_run: MakeRun, template: Path, tmp_path: Path) -> None:
    """MLflow records absolute places of artifacts; nothing appears where the store was."""
    folder, places = make_run(), [tmp_path / name for name in ("first", "second here", "third")]
    places[0].mkdir()
    (tmp_path / "runs").rename(places[0] / "runs")
    shutil.copy(template, places[0] / "mlflow.db")
    run_ids = {track_sync(RunFolder(places[0] / "runs" / folder.name), f"sqlite:///{places[0]}/mlflow.db")}
    for before, place in pairwise(places):
        before.rename(place)
        utils._artifact_repos_cache.clear()  # each command is a process of its own
        moved = RunFolder(place / "runs" / folder.name)
        (moved.figures / f"{place.name}.svg").write_text("<svg/>")
        run_ids.add(track_sync(moved))
        assert not before.exists()
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    assert len(run_ids) == len(client.search_runs(["1"])) == 1
    shown = {a.path for a in client.list_artifacts(run_ids.pop(), "figures")}
    assert shown >= {"figures/second here.svg", "figures/third.svg"}


def test_a_run_folder_that_cannot_be_written_is_not_laid_to_the_store(make_run: MakeRun, sqlite: str) -> None:
    folder = make_run()
    shutil.rmtree(folder.logs)
    folder.logs.touch()
    with pytest.raises(OSError, match=str(folder.logs)):
        track_sync(folder, sqlite)


def test_artifacts_that_fail_cost_no_metric_and_are_not_passed_over(
    make_run: MakeRun, sqlite: str, tmp_path: Path
) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    log_metrics(folder, 0, 50)
    blocked = tmp_path / "store" / "mlartifacts"
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("a file where a folder should be")
    with pytest.raises(TrackingError, match=r"sqlite:.* did not accept run: .*mlartifacts"):
        track_sync(folder, sqlite)
    run_id = runs_of(sqlite)[0].info.run_id
    assert history(sqlite, run_id, "train/loss") == written(folder, "loss")
    blocked.unlink()
    assert track_sync(folder) == run_id
    assert len(MlflowClient(sqlite).list_artifacts(run_id)) == 5


def test_a_full_disk_is_one_sentence(make_run: MakeRun, sqlite: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_run(steps=100)
    folder.append("start", step=0)
    log_metrics(folder, 0, 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as a full disk
    try:
        with pytest.raises(TrackingError, match=r"did not accept run: [^\n]+$"):
            track_sync(folder, sqlite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr().err == ""
    track_sync(folder, sqlite)


def test_a_database_that_was_removed_gets_everything_again(make_run: MakeRun, sqlite: str) -> None:
    folder = a_done_run(make_run)
    track_sync(folder, sqlite)
    cursor = Cursor.load(folder)
    assert cursor is not None
    cursor.run_id = "0" * 32  # as if the store were another one under the same address
    cursor.save(folder)
    run_id = track_sync(folder)
    assert history(sqlite, run_id, "train/loss") == written(folder, "loss")


def test_a_database_that_was_restored_from_a_backup_gets_everything_again(make_run: MakeRun, sqlite: str) -> None:
    folder = make_run("run", steps=200)
    folder.append("start", step=0)
    log_metrics(folder, 0, 100)
    uploader = Uploader(folder, sqlite)
    uploader.sync()
    with closing(sqlite3.connect(sqlite.removeprefix("sqlite:///"))) as store, closing(sqlite3.connect("")) as backup:
        store.backup(backup)
        log_metrics(folder, 100, 200)
        finish(folder, {"fp": 2.5})
        run_id = track_sync(folder)
        backup.backup(store)
    assert history(sqlite, run_id, "train/loss") == written(folder, "loss")[:10]
    assert track_sync(folder) == run_id
    assert history(sqlite, run_id, "train/loss") == written(folder, "loss")
    (run,) = runs_of(sqlite)
    assert (run.info.status, run.data.metrics["final/val_loss"]) == ("FINISHED", 2.5)


def test_two_runs_may_meet_an_empty_store(make_run: MakeRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """MLflow creates the tables of a SQLite file without a lock."""
    uri = f"sqlite:///{tmp_path}/fresh/mlflow.db"
    folders = [make_run(name) for name in ("a", "b")]
    for folder in folders:
        folder.append("start", step=0)
    code = """
import sys
from itertools import pairwise
from qatscale.tracking.mlflow_sync import track_sync
from qatscale.tracking.run_folder import RunFolder
track_sync(RunFolder.open(sys.argv[1]), sys.argv[2])
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(folders[0].path), uri])
    track_sync(folders[1], uri)
    assert child.wait(60) == 0
    assert {run.info.run_name for run in runs_of(uri)} == {"a", "b"}
    assert capfd.readouterr() == ("", ""), "no noise of MLflow or alembic"


def test_tracking_that_is_off_says_so(make_run: MakeRun) -> None:
    folder = make_run(overrides=("tracking.uri=none",))
    with pytest.raises(TrackingError, match=r"Tracking of run is off \(tracking.uri = none\)"):
        track_sync(folder)
    assert not folder.tracking_file.exists()


def test_the_names_of_a_record_in_mlflow() -> None:
    metrics = {
        "event": "metrics",
        "time": 1.5,
        "step": 3,
        "phase": "stable",
        "loss": 2.0,
        "mfu": None,
        "tflops": 7,
        "epoch": 0.5,
    }
    assert [(p.key, p.value, p.timestamp, p.step) for p in points(metrics)] == [
        ("train/loss", 2.0, 1500, 3), ("perf/tflops", 7.0, 1500, 3), ("train/epoch", 0.5, 1500, 3),
    ]  # fmt: skip
    validation = {"event": "validation", "time": 2.0, "step": 4, "view": "ptq1.58", "loss": 3.0, "perplexity": 20.1}
    assert [p.key for p in points(validation)] == ["val/loss_ptq1.58", "val/perplexity_ptq1.58"]
    final = {"event": "final", "time": 2.0, "step": 4, "metrics": {"n_params": 10, "scheme": "fp", "switch_step": None}}
    assert [(p.key, p.value) for p in points(final)] == [("n_params", 10.0)]
    spike = {"event": "spike", "time": 2.0, "step": 4, "norm": float("inf"), "mean": 1.0, "action": "skip"}
    assert [(p.key, p.value) for p in points(spike)] == [("train/spike_norm", float("inf"))]
    assert list(points({"event": "checkpoint", "time": 2.0, "step": 4, "path": "x", "kept": True})) == []


def test_a_flat_recipe_has_one_value_per_dotted_key() -> None:
    recipe = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": True, "g": "text", "h": {}}
    assert flatten(recipe) == {"a.b.c": "1", "a.d": "[1, 2]", "e": "null", "f": "true", "g": "text", "h": "{}"}


def test_no_key_is_flattened_twice(make_run: MakeRun) -> None:
    def leaves(value: object) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) and value else 1

    recipe = make_run().recipe
    assert len(flatten(recipe)) == leaves(recipe)
