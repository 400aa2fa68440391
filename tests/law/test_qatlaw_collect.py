"""From run folders and a real MLflow store to a table, to a fit, and back into the store."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel

from qatlaw import synthetic
from qatlaw.errors import InputError
from qatlaw.fit_file import read_fit
from qatlaw.fitting import fit
from qatlaw.laws import QAT_PER_BITS
from qatlaw.measurement import settings_with_effect
from qatlaw.mlflow_runs import KIND_TAG, mlflow_records
from qatlaw.results import read_results, write_results
from qatlaw.run_folders import folder_records
from qatlaw.runs import RunRecord, collect, counted
from qatlaw.table import POINT
from qatscale.cli.fit import collect_runs
from qatscale.config.recipe import load_run_config
from qatscale.config.schema import QatConfig, RunConfig
from qatscale.config.sizes import count_parameters, stored_weights
from qatscale.tracking.run_folder import RunFolder
from tests.law.law_runs import PTQ_BITS, PTQ_LOSS, command, empty_store, finished, finished_grid, upload

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


def test_effective_bits_stand_beside_the_nominal_ones(runs: tuple[Path, str]) -> None:
    """By the recipe of each run, as the trainer states them; for PTQ at the bits of the row."""
    records = folder_records(runs[0])
    finals = {record.name: record.final for record in records}
    frame = collect(records, "folders").table.frame
    configs = [load_run_config(name).model for name in ("86m", "396m", "2p2b")]
    models = {count_parameters(model): model for model in configs}
    for row in frame.to_dict("records"):
        qat = QatConfig() if row["scheme"] == "fp" else QatConfig(scheme="fused", bits=row["bits"])
        weights = stored_weights(models[row["n_params"]], qat)
        assert row["effective_bits"] == pytest.approx(weights.effective_bits, abs=5.01e-4)
        if row["scheme"] != "ptq":
            assert row["effective_bits"] == pytest.approx(finals[row["name"]]["effective_bits"], abs=5.01e-4)
    quantized = frame[frame["scheme"] == "sequential"]
    assert (quantized["effective_bits"] > quantized["bits"]).all()


def test_mlflow_and_run_folders_tell_the_same_table(runs: tuple[Path, str]) -> None:
    folder, uri = runs
    of_mlflow = collect(mlflow_records(uri, EXPERIMENT), "MLflow")
    of_folders = collect(folder_records(folder), "folders")
    assert of_mlflow.table.hash == of_folders.table.hash
    assert of_mlflow.left_out == of_folders.left_out == ()
    frame = of_mlflow.table.frame
    columns = [*POINT, "trial", "name"]
    pd.testing.assert_frame_equal(
        frame[columns].sort_values(columns, ignore_index=True),
        of_folders.table.frame[columns].sort_values(columns, ignore_index=True),
    )
    assert set(frame["validation_fingerprint"]) == {"e" * 64}
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
    assert file.data.runs == 45
    assert file.range["n_params"][0] == min(collect(mlflow_records(uri, EXPERIMENT), "").table.column("n_params"))

    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (logged,) = client.search_runs([experiment.experiment_id], f"tags.`{KIND_TAG}` = 'fit'")
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["fit/gamma"] == file.law.coefficients["gamma"]
    assert logged.data.params["data_hash"] == file.data.hash
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


RATE = "optimizer.learning_rate"


def record(name: str, loss: float, created: float, tokens_qat: float = 1e9, **recipe: str) -> RunRecord:
    final = {
        "n_params": 1e8, "bits": 4.0, "tokens_fp": 2e9 - tokens_qat, "tokens_qat": tokens_qat, "scheme": "fused",
        "final/val_loss": loss,
    }  # fmt: skip
    return RunRecord(name, name, "FINISHED", final, {"seed": "0", "name": name, **recipe}, created)


def test_a_run_that_was_trained_twice_counts_once_and_a_sweep_by_its_best() -> None:
    twice = collect([record("first", 3.0, 1.0), record("second", 3.1, 2.0)], "")
    assert list(twice.table.frame["name"]) == ["second"], "of the same recipe the later one, better or not"
    assert twice.left_out[0].reason == "trained again: as second, which is later"
    copied = collect([record("first", 3.0, 1.0), replace(record("copy", 3.0, 1.0), run_id="first")], "")
    assert len(copied.table) == 1, "a copied folder is the same run"
    rates = (("1", 3.2), ("2", 3.0), ("3", 3.1))
    sweep = collect([record(f"lr{rate}", loss, 0.0, **{RATE: rate}) for rate, loss in rates], "")
    assert list(sweep.table.frame["loss"]) == [3.0]
    assert list(sweep.table.frame["trial"]) == [f"{RATE}=2"]
    assert [one.name for one in sweep.left_out] == ["lr1", "lr3"]
    assert sweep.left_out[0].reason == f"a trial with a higher loss: {RATE}=1; the best is lr2"


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, as MLflow names it."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


TRIALS = {
    "optimizer.learning_rate", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay",
    "optimizer.gradient_clipping", "optimizer.on_spike", "optimizer.spike_factor", "optimizer.spike_limit",
    "schedule.phases", "schedule.warmup_fraction", "schedule.warmup_tokens",
    "qat.learning_rate", "qat.lr_ratio", "qat.optimizer_state", "qat.scale_lr_ratio", "qat.scale_gradient_factor",
    "qat.warmup_fraction", "qat.warmup_tokens",
}  # fmt: skip
NOT_SCIENCE = ("name", "output", "tracking.", "checkpoint.", "evaluation.", "log_interval", "batch.micro_batch")
BY_NUMBERS = {"tokens", "seed", "init", "data.seed", "qat.scheme", "qat.bits", "qat.fraction"}


@pytest.mark.parametrize("key", list(leaves(RunConfig)))
def test_trials_of_a_point_differ_in_the_optimizer_alone(key: str, tmp_path: Path) -> None:
    """Of a recipe's keys the optimizer's make trials, those of the job and of reports nothing, the rest points. The
    rows of results.csv say the same as the runs, but for the data's path, which differs from machine to machine."""
    runs = (record(name, loss, at) for name, loss, at in (("a", 3.0, 1.0), ("b", 3.1, 2.0)))
    one, other = (replace(run, recipe={**run.recipe, key: run.name}) for run in runs)
    found = collect([one, other], "")
    used, reasons = list(found.table.frame["name"]), [left.reason for left in found.left_out]
    write_results(tmp_path / "results.csv", [one, other])
    rows = collect(read_results(tmp_path / "results.csv"), "")
    if key != "data.path":
        assert (list(rows.table.frame["name"]), [left.reason for left in rows.left_out]) == (used, reasons)
    if key in TRIALS:
        assert (used, reasons) == (["a"], [f"a trial with a higher loss: {key}=b; the best is a"])
    elif key in ("seed", "data.seed", "data.cooldown_seed"):
        assert (used, reasons, found.notices) == (["a", "b"], [], ()), "a repeat"
    elif key in BY_NUMBERS or (key.startswith((*NOT_SCIENCE, "engine.")) and key != "engine.ds_config"):
        assert (used, reasons) == (["b"], ["trained again: as b, which is later"])
    elif key == "qat.cooldown_fraction":
        assert used == ["b"], "of sequential runs only, and this one is fused"
    else:
        assert (used, reasons) == (["a", "b"], []), "two points"
        assert f"the runs differ in {key} (a, b), which the law does not know" in found.notices


@pytest.mark.parametrize("key", ["schedule.knots", "schedule.yet_to_come"])
def test_settings_of_the_cooldown_that_differ_between_points_are_reported(key: str) -> None:
    small, large = (
        record(name, loss, 1.0, tokens, **{key: name}) for name, loss, tokens in (("a", 3, 1e9), ("b", 2, 5e8))
    )
    assert collect([small, large], "").notices == (f"the runs differ in {key} (a, b), which the law does not know",)


def test_settings_of_quantization_do_not_part_full_precision_runs() -> None:
    full = {"scheme": "fp", "bits": 16.0, "tokens_qat": 0.0}
    runs = [record(name, 3.0, at, **{"qat.group_size": name}) for name, at in (("32", 1.0), ("64", 2.0))]
    full_runs = [replace(run, final={**run.final, **full}) for run in runs]
    assert list(collect(full_runs, "").table.frame["name"]) == ["64"]
    quantized = replace(record("q", 3.2, 3.0), recipe={**runs[0].recipe, "qat.group_size": "32"})
    assert collect([*full_runs, quantized], "").notices == ()


def on_text(run: RunRecord, fingerprint: str, tokens: float) -> RunRecord:
    text = {"validation_fingerprint": fingerprint, "validation_tokens": tokens, "data_fingerprint": "same"}
    return replace(run, final={**run.final, **text})


@pytest.mark.parametrize(
    ("first", "second"), [(("text", 1e6), ("text", 150e3)), (("text", 1e6), ("other", 1e6))], ids=["tokens", "split"]
)
def test_runs_on_different_text_are_no_trials_and_no_fit(first: tuple[str, float], second: tuple[str, float]) -> None:
    """The easier text would win as the better trial. A fit of both is refused, naming the runs."""
    grid = [on_text(record(f"f{q:g}", 3.0 + q / 1e10, 0.0, tokens_qat=q), *first) for q in np.linspace(1e8, 9e8, 20)]
    easier = on_text(record("easier", 2.7, 0.0, tokens_qat=1e8, **{RATE: "2"}), *second)
    found = collect([*grid, easier], "runs")
    assert found.left_out == ()
    assert len(found.table) == 21
    with pytest.raises(
        InputError, match=r"20 on 1,000,000 tokens of split text \(f1e\+08, .*1 on .* \(easier\)"
    ) as raised:
        fit(QAT_PER_BITS, found.table)
    assert raised.value.key == "runs: held-out text"


def test_whole_sequences_of_the_same_text_are_the_same_text() -> None:
    """1M tokens are 488 sequences of 2,048 or 244 of 4,096; models of both lengths are of one study."""
    runs = [on_text(record(str(n), 3.0, 0.0, seed=str(n)), "text", n) for n in (999_424.0, 998_400.0)]
    collect(runs, "").table.check_text()


def test_trials_in_a_table_are_told_apart_as_those_of_runs_are(tmp_path: Path) -> None:
    """A table with a row a run, as a study writes it: the best trial of each point is used."""
    sweep = [record(f"lr{rate}", loss, 0.0, **{RATE: rate}) for rate, loss in (("1", 3.2), ("2", 3.0))]
    rows = [{**run.final, "name": run.name, "seed": "0", "trial": f"{RATE}={run.recipe[RATE]}"} for run in sweep]
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    found, _ = collect_runs(None, tmp_path / "results.csv", None, None)
    of_runs = collect(sweep, "")
    assert found.table.hash == of_runs.table.hash
    assert found.left_out == of_runs.left_out


def test_fit_refuses_run_folders_that_were_validated_on_different_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [(p, r, b, f) for p in ("86m", "194m", "396m") for r in (20, 60, 200) for b in (2, 4) for f in (0.2, 0.6)]
    for size, ratio, bits, fraction in cells:
        own = [f"qat.bits={bits}", "qat.scheme=sequential", f"qat.fraction={fraction}"]
        tokens = f"tokens={round(count_parameters(load_run_config(size).model) * ratio)}"
        finished(tmp_path, f"{size}-{ratio}x-{bits}bit-f{fraction}", size, LAW, tokens, *own)
    again = ["evaluation.tokens=150K", "optimizer.learning_rate=1e-3", "qat.bits=2", "qat.fraction=0.2"]
    tokens = f"tokens={round(count_parameters(load_run_config('86m').model) * 20)}"
    finished(tmp_path, "easier", "86m", LAW, tokens, "qat.scheme=sequential", *again, loss=2.0)
    assert command("fit", "--runs", str(tmp_path), "--out", str(tmp_path / "fit.json")) == 2
    said = capsys.readouterr().err
    assert "validated on different text" in said
    assert "(easier)" in said
    assert not (tmp_path / "fit.json").exists()


def test_an_infinite_loss_as_mlflow_keeps_it_is_diverged() -> None:
    """MLflow's SQL stores keep infinity as the largest float."""
    found = collect([record("a", 3.0, 0), record("b", 1.7976931348623157e308, 0, seed="1")], "")
    assert found.left_out[0].reason == "diverged: its loss is not finite"


def test_nothing_to_fit_on_is_told_with_the_reasons() -> None:
    fit = RunRecord("f", "f", "FINISHED", {}, {}, kind="fit")
    with pytest.raises(InputError, match=r"runs = 'x': no finished run to fit on: 1 diverged\."):
        collect([record("a", math.nan, 0), fit], "x")
    with pytest.raises(InputError, match="it holds none"):
        collect([fit], "x")


def test_a_store_or_experiment_that_is_not_there_is_told_and_not_made(runs: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such database"):
        mlflow_records(f"sqlite:///{tmp_path}/none.db", EXPERIMENT)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="Did you mean 'qatscale'"):
        mlflow_records(runs[1], "qatscal")


def test_a_mixture_is_one_setting() -> None:
    """One without it, or of other sources, has other keys; keys that a run lacks count as those of a newer version."""
    mixed = settings_with_effect({"data.mix.web": "0.7", "data.mix.code": "0.3", "data.cooldown_mix": "null"})
    assert mixed == {"data.mix": "{code: 0.3, web: 0.7}", "data.cooldown_mix": "null"}
