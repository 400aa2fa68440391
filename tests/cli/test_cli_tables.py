"""Every table that a command draws, in terminals of every width."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from qatlaw import synthetic
from qatscale.quant.report import ModuleReport, SwitchReport
from tests.cli.bad_inputs import run_command
from tests.tracking.synthetic_runs import finish, make_run_in

WIDTHS = (60, 80, 120, 200)
COMMANDS = (
    "recipes", "config qat", "train debug --dry-run --processes 2", "train 8b --dry-run --processes 64 "
    "engine.pipeline_stages=4 batch.micro_batch=1 engine.ds_config=zero1_bf16 --gpu H200 --mfu 0.4",
    "runs several",
    "compare several/a several/b several/with-a-long-name-for-its-settings",
    "plan --params 396M --tokens 100B --bits 4 --law synthetic", "plan --params 396M --tokens 100B --law synthetic",
    "plan memory 500MB --tokens 100B --law synthetic",
    "plan checkpoint --trained-tokens 60B --params 396M --bits 4 --law synthetic",
    "plan compute --gpu-hours 500 --gpu H200 --mfu 0.4 --recipe 396m --law synthetic",
    "plan waste --params 396M --tokens 100B --bits 4 --fraction 0.1 --law synthetic",
    "plan bit-widths --recipe 396m --tokens 100B --law chen-w4a16",
    "judge bitcpm4", "study plan study.yaml --law synthetic", "fit --table table.csv --resamples 0 --no-compare",
)  # fmt: skip
STUDY = (
    "name: small\nsizes: [{name: a-size-with-a-name, recipe: debug}]\ntokens: [10240]\nbits: [2, 4]\nfractions: [0.5]\n"
)


def numbers(text: str) -> set[str]:
    return {word.strip("(),:;") for word in text.split() if re.match(r"[-+(]?[0-9]", word)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for name, scheme in (("a", "fp"), ("b", "sequential"), ("with-a-long-name-for-its-settings", "fused")):
        run = make_run_in(folder / "several", name, scheme=scheme, steps=1000, switch=None if scheme == "fp" else 500)
        run.append("start", step=0)
        losses = {"fp": 3.12345, "ptq1": 11.5, "ptq1.58": 7.25, "ptq2": 5.12345, "ptq3": 4.5, "ptq4": 3.5, "ptq8": 3.25}
        finish(run, losses if scheme == "fp" else {"fp": 3.5, "quantized": 3.41251})
        run.close()
    (folder / "study.yaml").write_text(STUDY)
    table = synthetic.table(0, noise=0.0005).frame
    table[table["n_params"] < 2.5e8].to_csv(folder / "table.csv", index=False)
    return folder


@pytest.mark.parametrize("typed", COMMANDS)
def test_no_width_cuts_a_number(typed: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a narrow terminal shows, a wide one shows as well: half a number would be a number of its own."""
    shown = {}
    with contextlib.chdir(place):
        for width in WIDTHS:
            monkeypatch.setenv("COLUMNS", str(width))
            code, shown[width], error = run_command(shlex.split(typed))
            assert code == 0, error
    for width in WIDTHS:
        assert numbers(shown[width]) <= numbers(shown[200])
        rules = [line for line in shown[width].split("\n") if set(line) == {"-", " "}]
        assert all(len(rule) <= width for rule in rules)
        assert "…" not in shown[width].replace("KEY=VALUE…", "")
        assert not re.search(r"\b1 (processes|steps|runs|workers|micro-batches|layers|bits)\b", shown[width])


def test_a_comparison_keeps_its_losses_in_a_narrow_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with contextlib.chdir(place):
        shown = run_command(shlex.split("compare several/a several/b"))[1]
    assert {"3.1235", "11.5000", "7.2500", "5.1235", "3.4125"} <= numbers(shown)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_of_a_switch_keeps_its_errors(width: int) -> None:
    modules = tuple(
        ModuleReport((f"blocks.{i}.mlp.up",), 1.58, (14336, 4096), 14336, 16, 0.5 + i, 2.0) for i in range(2)
    )
    report = SwitchReport(11_796, modules, {"embed": "untied", "head": "untied"}, 2 * 14336 * 4096 + 1)
    out = io.StringIO()
    Console(file=out, width=width).print(report.table())
    assert {"117,440,512", "2.004", "0.7071"} <= numbers(out.getvalue())
    assert max(map(len, out.getvalue().split("\n"))) <= width
