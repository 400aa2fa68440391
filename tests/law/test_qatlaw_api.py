"""`import qatlaw` in a notebook: what the functions return, and that they agree with the command line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import qatlaw
from qatlaw import synthetic
from tests.law.law_runs import command, finished


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    frame = synthetic.table(0, noise=5e-4).frame
    return frame[frame["n_params"] < 5e8].iloc[::2]


@pytest.fixture(scope="module")
def fitted(runs: pd.DataFrame) -> qatlaw.summary.Summary:
    return qatlaw.fit(runs, resamples=20)


def test_every_name_exists_and_is_listed() -> None:
    assert dir(qatlaw) == qatlaw.__all__
    for name in qatlaw.__all__:
        assert getattr(qatlaw, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = qatlaw.nothing


def test_a_fit_finds_the_law_and_prints_its_coefficients(fitted: qatlaw.summary.Summary) -> None:
    cells = (np.array([1e8, 3e8]), 2e10, 4)
    assert fitted.law.optimal_fraction(*cells) == pytest.approx(synthetic.law().optimal_fraction(*cells), abs=0.02)
    frame = fitted.coefficients
    assert frame["value"].to_dict() == pytest.approx(fitted.law.coefficients, nan_ok=True)
    known = frame.dropna()
    assert (known["low"] <= known["value"]).all()
    assert (known["value"] <= known["high"]).all()
    lines = str(fitted).splitlines()
    assert len(lines) == 2 + len(frame)
    assert f"{fitted.law.coefficients['gamma']:.4g}" in str(fitted)


def test_a_saved_law_is_the_law(fitted: qatlaw.summary.Summary, tmp_path: Path) -> None:
    fitted.save(tmp_path / "fit.json")
    assert qatlaw.read_fit(tmp_path / "fit.json").law == fitted.law
    assert isinstance(fitted.law, qatlaw.Law)
    assert pickle.loads(pickle.dumps(fitted.law)) == fitted.law


def test_the_command_fits_the_same(runs: pd.DataFrame, fitted: qatlaw.summary.Summary, tmp_path: Path) -> None:
    own = {"n_params": "params", "loss": "val_loss"}
    runs.rename(columns=own).to_csv(tmp_path / "own.csv", index=False)
    columns = [word for ours, theirs in own.items() for word in ("--column", f"{ours}={theirs}")]
    out = tmp_path / "fit.json"
    asked = ("fit", "--table", str(tmp_path / "own.csv"), *columns, "--resamples", "0", "--no-compare")
    assert command(*asked, "--out", str(out)) == 0
    assert qatlaw.read_fit(out).law == fitted.law


def test_a_law_of_one_width_asks_for_the_width(runs: pd.DataFrame) -> None:
    with pytest.raises(qatlaw.InputError, match=r"bits = \[1.0, 2.0, 4.0, 6.0\]"):
        qatlaw.fit(runs, "qat_per_bits", resamples=0)
    assert qatlaw.fit(runs, "qat_per_bits", bits=2, resamples=0).result.table.widths == [2.0]


def test_folders_of_runs_with_what_was_left_out(tmp_path: Path) -> None:
    law, tokens = synthetic.law(), "tokens=5B"
    for fraction in ("0.2", "0.5"):
        finished(tmp_path, f"f{fraction}", "86m", law, tokens, "qat.scheme=fused", f"qat.fraction={fraction}")
    finished(tmp_path, "diverged", "86m", law, tokens, "qat.scheme=fp", loss=float("inf"))
    damaged = finished(tmp_path, "damaged", "86m", law, tokens, "qat.scheme=fp", "seed=1")
    damaged.run_file.write_text("")
    runs = qatlaw.read_runs(tmp_path)
    assert sorted(runs["name"]) == ["f0.2", "f0.5"]
    reasons = {one["name"]: one["reason"] for one in runs.attrs["left_out"]}
    assert reasons.keys() == {"diverged", "damaged"}
    assert reasons["damaged"].startswith("damaged: ")
    assert len(qatlaw.read_runs(tmp_path / "f0.2")) == 1
    with pytest.raises(qatlaw.InputError, match="holds no runs"):
        qatlaw.read_runs(tmp_path / "f0.2" / "logs")
    with pytest.raises(qatlaw.InputError, match="a folder, or an experiment"):
        qatlaw.read_runs()


def test_a_report_of_a_data_frame(runs: pd.DataFrame, fitted: qatlaw.summary.Summary, tmp_path: Path) -> None:
    fitted.save(tmp_path / "fit.json")
    runs.attrs = {"left_out": [{"name": "lost", "reason": "diverged: its loss is not finite"}]}
    page = qatlaw.report(runs, tmp_path / "report", law=str(tmp_path / "fit.json"))
    assert "lost" in page.read_text()
    assert page == tmp_path / "report" / "report.html"
