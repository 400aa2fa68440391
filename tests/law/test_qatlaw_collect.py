"""From run folders and a real MLflow store to a table, to a fit, and back into the store."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from law_runs import PTQ_BITS, PTQ_LOSS, command, empty_store, finished, finished_grid, upload

from qatlaw import synthetic
from qatlaw.errors import LawError
from qatlaw.fit_file import read_fit
from qatlaw.mlflow_runs import KIND_TAG, mlflow_records
from qatlaw.runs import RunRecord, collect, counted
from qatscale.cli.fit import folder_records
from qatscale.tracking.run_folder import RunFolder

LAW = synthetic.law()
EXPERIMENT = "qatscale"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder of run folders, MLflow store): 45 runs without noise, in both."""
    home = tmp_path_factory.mktemp("collect")
    folders = finished_grid(home / "runs", LAW, ["86m", "396m", "2p2b"], [20, 100, 600], [2, 4], [0.15, 0.5])
    uri = empty_store(home)
    upload(folders, uri)
    return home / "runs", uri


def test_mlflow_and_run_folders_tell_the_same_table(runs: tuple[Path, str]) -> None:
    folder, uri = runs
    of_mlflow = collect(mlflow_records(uri, EXPERIMENT), "MLflow")
    of_folders = collect(folder_records(folder), "folders")
    assert of_mlflow.table.hash == of_folders.table.hash
    assert of_mlflow.left_out == of_folders.left_out == ()
    frame = of_mlflow.table.frame
    assert dict(frame["scheme"].value_counts()) == {"sequential": 36, "ptq": 9 * len(PTQ_BITS), "fp": 9}
    quantized = frame[frame["scheme"] == "sequential"]
    law = LAW.loss(*(quantized[name] for name in ("n_params", "tokens_fp", "tokens_qat", "bits")))
    assert quantized["loss"].to_numpy() == pytest.approx(law, rel=1e-12)
    full, ptq = (frame[frame["scheme"] == name].set_index("name") for name in ("fp", "ptq"))
    gap = ptq["loss"] - full["loss"].loc[ptq.index]
    assert gap.to_numpy() == pytest.approx((PTQ_LOSS / ptq["bits"]).to_numpy(), abs=1e-12)
    assert any("data.sequence_length" in notice for notice in of_mlflow.notices), "2p2b has longer sequences"


def test_round_trip_to_the_law_and_back_into_mlflow(
    runs: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses without noise determine all 16 coefficients; the fit is no training run for the next one."""
    _, uri = runs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert command("fit", "--experiment", EXPERIMENT, "--resamples", "20", "--no-compare") == 0
    said = capsys.readouterr().out
    assert "lambda" in said
    assert "logged to MLflow as run" in said
    file = read_fit("fit.json")
    assert file.law.coefficients == pytest.approx(synthetic.COEFFICIENTS, rel=1e-3)
    assert file.data["runs"] == 45
    assert file.range["n_params"][0] == min(collect(mlflow_records(uri, EXPERIMENT), "").table.column("n_params"))

    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (logged,) = client.search_runs([experiment.experiment_id], f"tags.`{KIND_TAG}` = 'fit'")
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["fit/gamma"] == file.law.coefficients["gamma"]
    assert logged.data.params["data_hash"] == file.data["hash"]
    assert [a.path for a in client.list_artifacts(logged.info.run_id)] == ["fit.json"]
    kept = next(path for path in Path(uri.removeprefix("sqlite:///")).parent.rglob("artifacts/fit.json"))
    assert kept.read_bytes() == Path("fit.json").read_bytes()

    again = collect(mlflow_records(uri, EXPERIMENT), "")
    assert len(again.table) == 45 + 9 * len(PTQ_BITS), "no row of the fit's own run"


def test_what_is_no_point_of_a_law_is_left_out_with_the_reason(tmp_path: Path) -> None:
    out, tokens = tmp_path / "runs", "tokens=5B"
    sequential = (tokens, "qat.scheme=sequential", "qat.bits=2", "qat.fraction=0.3")
    finished(out, "good", "86m", LAW, *sequential)
    finished(out, "good-again", "86m", LAW, *sequential, "seed=1")
    finished(out, "trunk", "86m", LAW, tokens, "qat.scheme=fp", "schedule.cooldown_fraction=0")
    finished(out, "nan", "86m", LAW, "tokens=6B", "qat.scheme=fp", loss=math.nan)
    finished(out, "guessing", "86m", LAW, "tokens=7B", "qat.scheme=fp", loss=11.5)
    finished(out, "worse", "86m", LAW, *sequential, "optimizer.learning_rate=0.1", loss=5.0)
    stopped = finished(out, "stopped", "86m", LAW, "tokens=8B", "qat.scheme=fp")
    stopped.done_file.unlink()
    RunFolder(stopped.path).append("stopped", step=10, signal="SIGTERM")
    old = finished(out, "old", "86m", LAW, "tokens=9B", "qat.scheme=fp")
    done = json.loads(old.done_file.read_text())
    del done["metrics"]["tokens_fp"]
    old.done_file.write_text(json.dumps(done))

    found = collect(folder_records(out), "runs")
    assert sorted(found.table.frame["name"]) == ["good", "good-again"], "another seed is a repeat, no duplicate"
    reasons = {one.name: one.reason for one in found.left_out}
    assert reasons.keys() == {"trunk", "nan", "guessing", "worse", "stopped", "old"}
    assert reasons["trunk"].startswith("without a cooldown")
    assert reasons["nan"] == "diverged: its loss is not finite"
    assert "above ln(32000) = 10.4" in reasons["guessing"]
    assert reasons["worse"] == "a trial with a higher loss: optimizer.learning_rate=0.1; the best is good"
    assert reasons["stopped"] == "unfinished: stopped"
    assert reasons["old"] == "final metrics missing: tokens_fp"
    assert counted(found.left_out)["diverged"] == 2


def record(name: str, loss: float, created: float, **recipe: str) -> RunRecord:
    final = {
        "n_params": 1e8, "bits": 4.0, "tokens_fp": 1e9, "tokens_qat": 1e9, "scheme": "fused", "final/val_loss": loss,
    }  # fmt: skip
    return RunRecord(name, name, "FINISHED", final, {"seed": "0", "name": name, **recipe}, created)


def test_a_run_that_was_trained_twice_counts_once_and_a_sweep_by_its_best() -> None:
    twice = collect([record("first", 3.0, 1.0), record("second", 3.1, 2.0)], "")
    assert list(twice.table.frame["name"]) == ["second"], "of the same recipe the later one, better or not"
    assert twice.left_out[0].reason == "trained again: as second, which is later"
    sweep = collect([record(f"lr{lr}", loss, 0.0, lr=lr) for lr, loss in (("1", 3.2), ("2", 3.0), ("3", 3.1))], "")
    assert list(sweep.table.frame["loss"]) == [3.0]
    assert [one.name for one in sweep.left_out] == ["lr1", "lr3"]


def test_an_infinite_loss_as_mlflow_keeps_it_is_diverged() -> None:
    """MLflow's SQL stores keep infinity as the largest float."""
    found = collect([record("a", 3.0, 0), record("b", 1.7976931348623157e308, 0, seed="1")], "")
    assert found.left_out[0].reason == "diverged: its loss is not finite"


def test_nothing_to_fit_on_is_told_with_the_reasons() -> None:
    fit = RunRecord("f", "f", "FINISHED", {}, {}, kind="fit")
    with pytest.raises(LawError, match=r"runs = 'x': no finished run to fit on: 1 diverged\."):
        collect([record("a", math.nan, 0), fit], "x")
    with pytest.raises(LawError, match="it holds none"):
        collect([fit], "x")


def test_a_store_or_experiment_that_is_not_there_is_told_and_not_made(runs: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(LawError, match="no such database"):
        mlflow_records(f"sqlite:///{tmp_path}/none.db", EXPERIMENT)
    assert not list(tmp_path.iterdir())
    with pytest.raises(LawError, match="Did you mean 'qatscale'"):
        mlflow_records(runs[1], "qatscal")
