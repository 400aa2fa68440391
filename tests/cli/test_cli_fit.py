"""`qatscale fit` and `qatscale report` on tables: what they write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qatlaw import synthetic
from qatlaw.fit_file import read_fit
from qatlaw.plan.shapes import nearest_shape
from qatscale.cli import main
from qatscale.config.recipe import load_run_config
from qatscale.config.sizes import stored_weights
from tests.cli.bad_inputs import run_command


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables by what is wrong with them, and one that is not."""
    folder = tmp_path_factory.mktemp("tables")
    table = synthetic.table(0, noise=0.0005)
    frame = table.frame[table.column("n_params") < 5e8]
    frame.to_csv(folder / "good.csv", index=False)
    frame[frame["bits"].isin([4, 16])].to_csv(folder / "one_width.csv", index=False)
    frame.iloc[::30].to_csv(folder / "few.csv", index=False)
    frame.drop(columns="loss").to_csv(folder / "no_loss.csv", index=False)
    frame.assign(n_params=frame["n_params"] / 1e6).to_csv(folder / "millions.csv", index=False)
    frame.assign(loss=frame["loss"].where(frame["bits"] != 4)).to_csv(folder / "nan.csv", index=False)
    frame[frame["scheme"] == "fp"].to_csv(folder / "fp.csv", index=False)
    fused = frame[frame["scheme"] == "sequential"].assign(scheme="fused")
    both = [*frame.to_dict("records"), *fused.to_dict("records")]
    type(frame)(both).to_csv(folder / "both.csv", index=False)
    (folder / "table.txt").write_text("")
    return folder


def test_a_law_of_effective_bits_is_fitted_on_them(tmp_path: Path) -> None:
    """Losses drawn by effective bits, of which a smaller model has more: in nominal ones the same form fits worse."""
    table = synthetic.table(0, noise=0.0)
    frame = table.frame[table.column("n_params") < 5e8].copy()
    share = (frame["n_params"] / 86e6) ** -0.5 * 0.4  # the embedding's, at 4 bits
    frame["effective_bits"] = frame["bits"] * (1 - share) + np.maximum(frame["bits"], 4) * share
    frame["loss"] = synthetic.law().loss(
        *(frame[name] for name in ("n_params", "tokens_fp", "tokens_qat", "effective_bits"))
    )
    frame.to_csv(tmp_path / "runs.csv", index=False)
    files = {}
    for bits in ("nominal", "effective"):
        out = tmp_path / f"{bits}.json"
        asked = ["fit", "--table", str(tmp_path / "runs.csv"), "--resamples", "0", "--no-compare", "--out", str(out)]
        assert run(*asked, "--bits", bits) == 0
        files[bits] = read_fit(out)
        assert files[bits].data.bits == bits
    assert files["effective"].quality["mae"] < 0.1 * files["nominal"].quality["mae"]
    _plans_by_effective_bits(tmp_path / "effective.json")


def _plans_by_effective_bits(file: Path) -> None:
    """Bits are nominal in questions and answers; the law gets the effective ones of the model that is asked about."""
    law, D = read_fit(file).law, 20e9

    def plan(typed: str) -> Any:
        code, out, error = run_command(["plan", *typed.split(), "--tokens", "20B", "--json", "--law", str(file)])
        assert code == 0, error
        return json.loads(out)["plan"]

    model = load_run_config("194m")
    of_recipe = stored_weights(model.model, model.qat.model_copy(update={"bits": 2}), "bf16")
    usual = nearest_shape(200e6)
    assert usual is not None
    for typed, N, bits in (
        ("--params 200M --bits 2", 200e6, usual.weights(2).effective_bits),
        ("--recipe 194m --bits 2", of_recipe.params, of_recipe.effective_bits),
    ):
        found = plan(typed)
        assert (found["bits"], found["effective_bits"]) == (2, pytest.approx(float(bits)))
        assert found["optimum"] == pytest.approx(float(law.optimal_fraction(N, D, bits)))
        f = found["fraction"]
        assert found["prediction"]["loss"] == pytest.approx(float(law.loss(N, (1 - f) * D, f * D, bits)))
    (row,) = plan("memory 60MB --bits 2")["rows"]
    N, bits = row["shape"]["params"], row["plan"]["effective_bits"]
    assert row["plan"]["optimum"] == pytest.approx(float(law.optimal_fraction(N, D, bits)))
    code, _, error = run_command(["plan", "--params", "1K", "--tokens", "1M", "--bits", "2", "--law", str(file)])
    assert code == 2
    assert "--params = 1000.0: no usual shape" in error
    study = file.with_name("study.yaml")
    study.write_text("name: s\nsizes: [{name: a, recipe: 86k}]\ntokens: [8.6M]\nbits: [1, 4]\nfractions: [0.5]\n")
    code, out, error = run_command(["study", "plan", str(study), "--law", str(file), "--json"])
    assert code == 0, error
    runs = {(one["bits"], round(one["effective_bits"], 3)) for one in json.loads(out)["runs"] if one["bits"]}
    config = load_run_config("86k")
    expected = {
        bits: stored_weights(config.model, config.qat.model_copy(update={"bits": bits}), "fp32").effective_bits
        for bits in (1, 4)
    }
    assert runs == {(bits, round(float(found), 3)) for bits, found in expected.items()}


WRONG = {
    "no source": ([], ("source", "--experiment, --table, --runs")),
    "two sources": (["--table", "good.csv", "--runs", "runs"], ("--table and --runs",)),
    "no such table": (["--table", "god.csv"], ("'god.csv'", "no such file")),
    "no table": (["--table", "table.txt"], (".csv or .parquet",)),
    "no such form": (["--table", "good.csv", "--form", "qat_unifid"], ("qat_unifid", "qat_unified")),
    "no such scheme": (["--table", "good.csv", "--scheme", "fusd"], ("--scheme = 'fusd'", "sequential, fused")),
    "a scheme without runs": (["--table", "good.csv", "--scheme", "fused"], ("no such run", "sequential")),
    "two schemes": (["--table", "both.csv"], ("--scheme", "720", "sequential", "fused")),
    "one width for a unified law": (["--table", "one_width.csv"], ("bits", "at least two", "qat_per_bits")),
    "too few runs": (["--table", "few.csv"], ("rows", "16 parameters")),
    "a missing column": (["--table", "no_loss.csv"], ("columns", "loss missing")),
    "millions": (["--table", "millions.csv"], ("n_params of row 1", "is a unit wrong?", "86000000")),
    "NaN": (["--table", "nan.csv"], ("loss of row", "finite")),
    "no QAT run": (["--table", "fp.csv"], ("no run has two phases",)),
    "no run folders": (["--runs", "."], ("--runs = '.'", "holds no runs")),
    "a store without a use": (["--table", "good.csv", "--uri", "sqlite:///a.db"], ("--uri", "--experiment")),
    "unknown effective bits": (["--table", "good.csv", "--bits", "effective"], ("effective_bits", "no such column")),
    "few resamples": (["--table", "good.csv", "--resamples", "3"], ("resamples = 3", "20 or more")),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_fitted_is_refused_with_what_to_do(
    what: str, tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tables)
    arguments, tells = WRONG[what]
    assert run("fit", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    for part in tells:
        assert part.replace("720", str(3 * 6 * 4 * 6)) in said
    assert not (tables / "fit.json").exists()


def test_a_fit_for_programs_and_its_file(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = str(tables / "good.csv")
    assert run("fit", "--table", table, "--resamples", "20", "--no-compare", "--json", "--out", "laws/fit.json") == 0
    said = json.loads(capsys.readouterr().out)
    file = read_fit("laws/fit.json")
    assert said["fits"][0]["coefficients"] == file.law.coefficients
    assert said["files"] == ["laws/fit.json"]
    assert file.law.coefficients["gamma"] == pytest.approx(synthetic.COEFFICIENTS["gamma"], rel=0.05)
    low, high = file.intervals["gamma"]
    assert low < file.law.coefficients["gamma"] < high
    assert file.quality["scheme"] == "sequential"
    assert file.data.synthetic, "what is drawn from a made-up law stays marked"
    f = file.law.optimal_fraction(2e8, 50e9, np.array([1.0, 2.0, 4.0]))
    assert np.abs(f - synthetic.law().optimal_fraction(2e8, 50e9, np.array([1.0, 2.0, 4.0]))).max() < 0.02


def test_a_law_for_each_width_has_a_file_for_each(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--form", "qat_per_bits", "--resamples", "0", "--no-compare"]
    assert run("fit", "--table", str(tables / "good.csv"), *options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fit-1bit.json", "fit-2bit.json", "fit-4bit.json", "fit-6bit.json",
    ]  # fmt: skip
    assert "qat_per_bits, 1 bit:" in capsys.readouterr().out


def test_the_comparison_and_the_quality_are_printed(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("fit", "--table", str(tables / "good.csv"), "--resamples", "0") == 0
    said = capsys.readouterr().out
    for name in ("MAE of f*", "chen_2025", "kumar_2024", "no optimum", "full precision", "cold starts"):
        assert name in said
