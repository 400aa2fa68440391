"""Files that were made to do harm: what they hold steers no terminal, leaves its folder or fills the memory."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qatscale.cli.broken_pipe import IgnoreBrokenPipe
from qatscale.errors import EXIT_BAD_INPUT
from qatscale.study.folder import StudyFolder
from qatscale.study.lay_out import lay_out
from tests.cli.bad_inputs import copy_world, run_command
from tests.damage import write_fit_file, write_landscape

EVIL = "\x1b[31mred\x1b]0;title\x07\u202e\x9b2J"
FORMULA = r"a$\frac$b"
FIT = "--form qat_per_bits --no-compare --resamples 0"
STUDY = "sizes: [debug]\ntokens: [25600]\nbits: [2]\nfractions: [0, 0.5]\nschemes: [fused]\n"


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path.resolve() / "here"
    copy_world(world, folder)
    monkeypatch.chdir(folder)
    Path("study.yaml").write_text(STUDY)
    rows = [f"86e6,4,{k}e9,{k}e8,{3.5 - k / 10},fused" for k in range(1, 4)]
    Path("table.csv").write_text("\n".join(["n_params,bits,tokens_fp,tokens_qat,loss,scheme", *rows]))
    return folder


def edit(name: str, change: Callable[[Any], object]) -> None:
    path = Path(name)
    content = json.loads(path.read_bytes())
    change(content)
    path.unlink()  # it is linked with the one of other tests
    path.write_text(json.dumps(content))


def answer(typed: str | list[str], code: int = EXIT_BAD_INPUT) -> str:
    found, out, error = run_command(shlex.split(typed) if isinstance(typed, str) else typed)
    assert found == code, out + error
    assert "Traceback" not in out + error
    return out + error


def _in_a_run() -> str:
    edit("runs/trunk/run.json", lambda run: run.update(name=EVIL))
    return "compare runs/trunk"


def _in_a_failure() -> str:
    Path("runs/trunk/done.json").unlink()
    records = Path("runs/trunk/metrics.jsonl").read_text()
    Path("runs/trunk/metrics.jsonl").unlink()
    failed = json.dumps({"event": "failed", "time": 1.0, "step": 10, "error": EVIL})
    Path("runs/trunk/metrics.jsonl").write_text(f"{records}{failed}\n")
    return "branch runs/trunk name=x data.path=data tokens=5120 qat.fraction=0.75 --dry-run"


def _in_a_claim() -> str:
    folder = _study()
    claim = folder.claims.take(next(iter(folder.jobs)), 0, "a-1")
    assert claim is not None
    claim.close("failed", EVIL)
    return f"study status {folder.path}"


def _in_a_law() -> str:
    write_fit_file()
    edit("fit.json", lambda fit: fit["data"].update(source=EVIL))
    return "plan --params 396M --tokens 100B --bits 4 --law fit.json"


def _in_a_study() -> str:
    Path("study.yaml").write_text(f'name: "X\\e[31mred"\n{STUDY}')
    return "study plan study.yaml"


def _in_a_folder_name() -> str:
    Path("runs/trunk").rename(f"runs/{EVIL}")
    Path(f"runs/{EVIL}/done.json").unlink()
    Path(f"runs/{EVIL}/done.json").write_text("{}")
    return "runs runs"


def _study() -> StudyFolder:
    folder = StudyFolder(Path("study"))
    lay_out(Path("study.yaml"), folder)
    return folder


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("place", [_in_a_run, _in_a_failure, _in_a_claim, _in_a_law, _in_a_study, _in_a_folder_name])
def test_what_a_file_holds_steers_no_terminal(place: Callable[[], str]) -> None:
    said = answer(place(), 0)
    assert r"\x1b[31mred" in said
    assert not set(said) & {"\x1b", "\x07", "\u202e", "\x9b"}


def test_colours_reach_a_terminal_and_other_commands_to_it_do_not() -> None:
    reading, writing = os.openpty()
    with os.fdopen(writing, "w") as terminal:
        IgnoreBrokenPipe(terminal).write("\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J")
    said = os.read(reading, 1000).decode()
    os.close(reading)
    assert said == "\x1b[31mred\x1b[0m \\x1b]0;title\\x07 \\x1b[2J"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "key", "typed"),
    [
        ("fit.json", "form", "plan --params 396M --tokens 100B --bits 4 --law fit.json"),
        ("data/manifest.json", "dtype", "train debug data.path=data --dry-run"),
        ("runs/trunk/run.json", "name", "compare runs/trunk"),
    ],
)
def test_a_key_that_occurs_twice_is_refused(name: str, key: str, typed: str) -> None:
    write_fit_file()
    text = Path(name).read_text()
    Path(name).unlink()
    Path(name).write_text(text.replace("{", f'{{"{key}": "other", ', 1))
    assert f"the key '{key}' occurs twice" in answer(typed)


@pytest.mark.usefixtures("here")
def test_names_in_files_lead_nowhere_else() -> None:
    def elsewhere(manifest: Any) -> None:
        del manifest["checksum"]
        manifest["tokenizer"]["folder"] = "../../../../etc"

    edit("data/manifest.json", elsewhere)
    assert "leads out of the folder" in answer("export runs/trunk --format hf --data data --out out")
    folder = _study()
    edit("study/tree.json", lambda jobs: (jobs[0].update(name="../../x"), jobs[1].update(parent="../../x")))
    assert "0.name: String should match" in answer(f"study status {folder.path}")


@pytest.mark.usefixtures("here")
def test_a_file_without_an_end_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatlaw.files.LARGEST", 1 << 20)
    folder = _study()
    endless = [folder.path / f"claims/{next(iter(folder.jobs))}~0001.json", folder.results, Path("landscape/grid.csv")]
    write_landscape()
    Path("landscape/grid.csv").unlink()
    endless[0].parent.mkdir()
    for path in endless:
        path.symlink_to("/dev/zero")
    assert "results.csv: cannot be read" in answer("study status study")
    folder.results.unlink()
    assert "1 running" in answer("study status study", 0), "a damaged claim expires like a silent one"
    said = answer(f"report --table table.csv --landscape landscape {FIT} --out report")
    assert "landscape/grid.csv' cannot be read: " in said.replace("': ", "' ")


@pytest.mark.usefixtures("here")
def test_a_claim_of_no_number_is_passed_over() -> None:
    folder = _study()
    name = next(iter(folder.jobs))
    folder.claims.folder.mkdir()
    Path(folder.claims.folder, f"{name}~abc.json").write_text("{}")
    Path(folder.claims.folder, f"{name}~0001.json").write_text('{"state": "running"}')
    assert "1 ready" in answer("study status study", 0)


@pytest.mark.usefixtures("here")
def test_a_name_is_not_a_formula_of_a_figure() -> None:
    Path("runs/trunk").rename(f"runs/{FORMULA}")
    answer(["compare", f"runs/{FORMULA}", "--figure", "compared.png"], 0)
    Path("table.csv").rename(f"{FORMULA}.csv")
    answer(["judge", f"{FORMULA}.csv", "--out", "judged"], 0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("nested", [[[1]] * 3, [{"a": 1}] * 3, None])
def test_a_table_of_tables_is_refused(nested: list[Any] | None) -> None:
    frame = pd.read_csv("table.csv")
    if nested is None:
        frame.columns = pd.MultiIndex.from_tuples([(name, "") for name in frame.columns])
    else:
        frame["seed"] = nested
    frame.to_parquet("table.parquet")
    assert "holds lists, mappings or columns of several levels" in answer(f"fit --table table.parquet {FIT}")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["evaluate runs/trunk@²", "plan checkpoint runs/trunk@² --bits 4"])
def test_a_power_is_no_step(command: str) -> None:
    assert "no checkpoint at step ²" in answer(command)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "0.steps: Input should be greater than 0"), ({"start": 10**9}, "or begins after its end"),
        ({"processes": 0}, "0.processes"), ({"tokens_per_step": 0}, "0.tokens_per_step"),
    ],
)  # fmt: skip
def test_runs_of_a_tree_that_cannot_be_trained_are_refused(change: dict[str, int], said: str) -> None:
    folder = _study()
    edit("study/tree.json", lambda jobs: jobs[0].update(change))
    assert said in answer(f"study status {folder.path}")


@pytest.mark.usefixtures("here")
def test_results_without_schemes_make_no_law() -> None:
    folder = _study()
    folder.results.write_text("name,n_params\na,1\n")
    assert "no report: " in answer(f"study average {folder.path}", 0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("tracking", ["", "tracking: 3\n", "tracking: {experiment: 3}\n"])
def test_a_recorded_recipe_has_an_experiment(tracking: str) -> None:
    recipe = Path("runs/trunk/recipe.yaml")
    recipe.unlink()
    recipe.write_text(f"data: {{path: data}}\nqat: {{scheme: fp, bits: 4}}\n{tracking}")
    assert "recipe.yaml': is damaged: tracking" in answer("track-sync runs/trunk --uri sqlite:///y.db")


@pytest.mark.usefixtures("here")
def test_a_run_without_parameters_is_damaged() -> None:
    edit("runs/trunk/run.json", lambda run: run.update(n_params=0))
    assert "n_params: Input should be greater than 0" in answer("plan checkpoint runs/trunk@5 --bits 4")


SECRET = "http://me@corp.com:s3cret@127.0.0.1:9/x?token=s3cret"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "typed",
    [
        f"train debug tracking={SECRET}", f"train {SECRET}", f"fit --table table.csv --uri {SECRET}",
        f"prepare {SECRET} --out out", "train debug engine.ds_config=ds.json --dry-run", "study plan vary.yaml",
    ],
)  # fmt: skip
def test_no_message_holds_a_password(typed: str) -> None:
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "wandb": SECRET}))
    Path("vary.yaml").write_text(f"{STUDY}vary: {{tracking.uri: ['{SECRET}']}}\n")
    assert "s3cret" not in answer(typed)


@pytest.mark.usefixtures("here")
def test_no_study_keeps_a_password() -> None:
    override = f"'tracking.uri={SECRET}'"
    sizes = f"sizes: [{{name: a, recipe: debug, set: [{override}]}}]\n"
    Path("study.yaml").write_text(STUDY.replace("sizes: [debug]\n", sizes) + f"set: [{override}]\n")
    for _ in range(2):
        folder = _study()
        files = [path for path in folder.path.rglob("*") if path.is_file()]
        assert [str(path) for path in files if b"s3cret" in path.read_bytes()] == []
        assert "s3cret" not in answer("study plan study.yaml --json", 0)
    assert "tracking.uri=http://127.0.0.1:9/x?token=" in folder.study_file.read_text()


@pytest.mark.usefixtures("here")
def test_a_run_keeps_no_key_of_a_service_and_names_a_key_that_deepspeed_alone_knows() -> None:
    monitors = {"comet": {"enabled": False, "api_key": "s3cret"}, "csv_monitor": {"enabled": False, "job_name": SECRET}}
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, **monitors, "wandb": {"host": SECRET}}))
    run = (
        "train debug engine.ds_config=ds.json data.path=data tracking.uri=none tokens=512 evaluation.tokens=256 name=x"
    )
    assert "engine.ds_config = 'ds.json': wandb.host: Extra inputs are not permitted" in answer(run)
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, **monitors}))
    answer(run, 0)
    kept = json.loads(Path("runs/x/ds_config.json").read_text())
    assert (kept["comet"]["api_key"], kept["csv_monitor"]["job_name"]) == ("", "http://127.0.0.1:9/x?token=")
