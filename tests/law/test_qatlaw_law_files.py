"""`--law`: a fit.json by its path, laws that ship with the package by their name, and files that hold no sound law."""

from __future__ import annotations

import json
import math
import resource
import runpy
import signal
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qatlaw import synthetic
from qatlaw.__main__ import main
from qatlaw.curves import measured_curves
from qatlaw.errors import InputError
from qatlaw.fit_file import FitFile, read_fit, write_fit
from qatlaw.fraction_laws import LADDER
from qatlaw.planner_law import load_law
from qatlaw.tables import load_table
from tests.law.law_runs import command

LAW = synthetic.law()
THETAS = np.array([LAW.theta, LAW.theta])


def content(folder: Path) -> dict[str, Any]:
    """A sound fit.json, as it is written."""
    file = FitFile(
        format=1,
        form=LAW.form.name,
        coefficients=LAW.coefficients,
        intervals={"rho": (0.04, 0.05)},
        bootstrap={"level": 0.9, "thetas": THETAS.tolist(), "unknown": [], "loss_sizes": None},
        range={"n_params": (86e6, 2.2e9), "tokens": (2.3e9, 1.4e12), "bits": (1.0, 6.0), "s_total": (35.0, 1e5)},
        data={"hash": "x", "runs": 2, "sizes": [86e6, 2.2e9], "source": "two runs", "left_out": {}, "synthetic": False},
        quality={"r2": 0.99},
        created="2026-01-01T00:00:00+00:00",
    )
    write_fit(folder / "sound.json", file)
    return json.loads((folder / "sound.json").read_text())


def set_field(data: Any, field: str, value: Any) -> None:
    *parents, last = [int(name) if name.isdigit() else name for name in field.split(".")]
    reduce(getitem, parents, data)[last] = value


def test_a_full_disk_spares_the_former_file(tmp_path: Path) -> None:
    content(tmp_path)
    path = tmp_path / "sound.json"
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_fit(path, read_fit(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["sound.json"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("format", "1"),
        ("form", 7),
        ("form", "unheard_of"),
        ("coefficients", [1, 2]),
        ("coefficients.beta", "2085"),
        ("coefficients.beta", None),
        ("coefficients.beta", True),
        ("coefficients.beta", math.nan),
        ("coefficients.beta", math.inf),
        ("coefficients.beta", 0),
        ("coefficients.beta", 0.0),
        ("coefficients.beta", -1.0),
        ("coefficients.beta", 1e308),
        ("coefficients.beta", 1e-308),
        ("coefficients.xi", 0),
        ("coefficients.xi", 1e308),
        ("coefficients.unheard_of", 1.0),
        ("intervals", None),
        ("intervals.rho", [0.1]),
        ("range", "all"),
        ("range.bits", [1]),
        ("range.bits", ["1", "6"]),
        ("range.tokens", [math.nan, 1e12]),
        ("range.tokens", [1e12, 1e9]),
        ("range", {}),
        ("range.tokens", [0, 1e12]),
        ("data", []),
        ("data.runs", "many"),
        ("data.runs", 10**400),
        ("data.source", None),
        ("data.sizes", 86e6),
        ("data.sizes", [math.nan]),
        ("data.synthetic", "no"),
        ("quality", 0.99),
        ("created", 2026),
        ("bootstrap", [1]),
        ("bootstrap.level", 1.5),
        ("bootstrap.thetas", []),
        ("bootstrap.thetas", [[1.0, 2.0]]),
        ("bootstrap.thetas.1.0", math.nan),
        ("bootstrap.thetas.1.0", 0),
        ("bootstrap.unknown", "alpha"),
        ("bootstrap.loss_sizes", ["86M"]),
    ],
)
def test_an_unsound_field_is_refused_by_its_name(
    tmp_path: Path, field: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = content(tmp_path)
    set_field(data, field, value)
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SystemExit) as stop:
        main(["--params", "396M", "--tokens", "100B", "--bits", "4", "--law", str(path)])
    out, error = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert f"fit.json: {field.partition('.1.0')[0]}" in error


@pytest.mark.parametrize("field", ["form", "coefficients", "coefficients.xi", "range", "data", "data.runs", "created"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    data = content(tmp_path)
    *parents, last = field.split(".")
    holder = data[parents[0]] if parents else data
    del holder[last]
    (tmp_path / "fit.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=last):
        load_law(str(tmp_path / "fit.json"))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"format": ' * 100_000])
def test_what_is_not_a_fit_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "fit.json").write_bytes(text)
    with pytest.raises(InputError, match=r"fit\.json"):
        load_law(str(tmp_path / "fit.json"))


@pytest.mark.parametrize("value", [1e-300, 1e300])
@pytest.mark.parametrize("name", [parameter.name for parameter in LAW.form.parameters if parameter.log])
def test_at_the_ends_of_what_is_sound_every_question_has_an_answer(
    tmp_path: Path, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer or a refusal, never a traceback."""
    data = content(tmp_path)
    data["coefficients"][name] = value
    data["bootstrap"]["thetas"] = [[data["coefficients"][p] for p in LAW.form.names]] * 2
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(data))
    run = "--params 396M --tokens 100B --bits 4"
    for words in (
        run, "bit-widths --params 396M --tokens 100B", "memory 500MB --tokens 100B", "compute --flops 1e21",
        "checkpoint --trained-tokens 60B --params 396M --bits 2", f"waste {run} --fraction 0.1",
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main([*words.split(), "--law", str(path), "--json"])
        error = capsys.readouterr().err
        assert (stop.value.code, error) == (0, "") or (stop.value.code == 2 and error.startswith("error: "))


# ---- the ladder's law ----


def test_a_wrong_name_is_told_the_right_ones() -> None:
    with pytest.raises(InputError, match=r"--law = 'laddder': .*\(synthetic, ladder-1to1000\)"):
        load_law("laddder")


def test_the_ladder_ships_as_it_was_measured() -> None:
    """The package's table is that of the study, which is not installed with it; its constants follow from the table."""
    table = load_table("ladder-1to1000").runs
    assert table.hash == load_table("analysis/studies/ladder-1to1000/results.csv").runs.hash
    curves = [curve for curve in measured_curves(table) if curve.scheme == "sequential"]
    closed_form_constant = runpy.run_path("analysis/studies/ladder-1to1000/tables.py")["closed_form_constant"]
    for bits, constants in LADDER.constants.items():
        own = [curve for curve in curves if bits == curve.B]
        found = closed_form_constant(own)
        assert (found.A, found.low, found.high) == pytest.approx(constants, rel=0.02)
    S = [curve.S for curve in curves]
    assert (round(min(S)), round(max(S))) == LADDER.measured["S"]


def test_a_law_of_fractions_plans_where_no_losses_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--params", "199440", "--law", "ladder-1to1000"]
    assert command("plan", *size, "--tokens", "4.6M", "--bits", "4", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    A, *_ = LADDER.constants[4]
    assert answer["plan"]["fraction"] == pytest.approx(math.exp(-A / math.log(4.6e6 / (199_440 / 2))))
    assert "thousandth" in answer["law"]["source"]
    assert answer["warnings"] == []
    assert command("plan", *size, "--tokens", "4.6M", "--json") == 0
    assert [row["bits"] for row in json.loads(capsys.readouterr().out)["plan"]["rows"]] == [1, 2, 4]
    assert command("plan", "checkpoint", *size, "--trained-tokens", "4M", "--bits", "4", "--json") == 0
    deserved = json.loads(capsys.readouterr().out)["plan"]["tokens_qat"]
    D = 4e6 + deserved
    assert deserved / D == pytest.approx(math.exp(-A / math.log(D / (199_440 / 2))), rel=1e-4)
    assert command("plan", *size, "--tokens", "4.6M", "--bits", "3") == 2
    assert command("plan", "waste", *size, "--tokens", "4.6M", "--bits", "2", "--fraction", "0.1") == 2
    assert "fractions alone" in capsys.readouterr().err
    assert command("plan", "--params", "396M", "--tokens", "100B", "--bits", "2", "--law", "ladder-1to1000") == 0
    assert "N = 396M (measured 86.3K to 763K)" in " ".join(capsys.readouterr().out.split())
