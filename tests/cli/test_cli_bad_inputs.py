"""Every bad input through the real entry point: exit status 2, a message that names key and cure, nothing started."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from qatscale.errors import EXIT_BAD_INPUT
from tests.cli.bad_inputs import Case, cases, copy_world, run_command


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.typed)
def test_a_bad_input_is_named_and_starts_nothing(
    case: Case, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path.resolve() / "here"
    copy_world(world, folder)
    before = set(folder.rglob("*"))
    monkeypatch.chdir(folder)
    code, out, error = run_command(shlex.split(case.typed))
    assert code == EXIT_BAD_INPUT, out + error
    assert "Traceback" not in out + error
    named = [line.strip().removeprefix("error: ") for line in error.splitlines()]
    assert any(line.startswith((f"{case.key}: ", f"{case.key} = ")) for line in named), error
    assert [fact for fact in case.facts if fact not in error] == [], error
    left = {path for path in set(folder.rglob("*")) ^ before if path.relative_to(folder).parts[0] != "out"}
    assert not left, "only an unfinished `prepare` may leave something, in its own folder"
    assert not (folder / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("typed", "fact"),
    [
        ("trian debug", "'train'"),
        ("prepare corpus.jsonl", "'--out'"),
        ("evaluate runs/trunk --bits 4", "--bits"),
        ("plan memory 500MB --bits 4", "'--tokens'"),
        ("generate runs/trunk --prompt a --seed 99999999999999999999", "--seed"),
        ("landscape runs/trunk@5 runs/trunk --out l --resolution 99999999999", "--resolution"),
        ("study plan study.yaml --workers 99999999999999999999", "--workers"),
        ("prepare corpus.jsonl --out out --vocab-size 99999999999999999999", "--vocab-size"),
    ],
)
def test_a_wrong_command_line_names_what_is_wrong(typed: str, fact: str) -> None:
    code, out, error = run_command(shlex.split(typed))
    assert (code, out) == (EXIT_BAD_INPUT, "")
    assert fact in " ".join(error.replace("│", " ").split())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("report results.csv", "results.csv is a table; what reads it: judge, fit --table, report --table"),
        ("fit --runs=results.csv", "results.csv is a table"),
        ("evaluate a@2", "runs/a is a run"),
        ("judge runs", "runs is a folder of runs; what reads it: runs, fit --runs"),
        ("resume data", "data is a folder of prepared data; what reads it: train data.path"),
        ("evaluate study.yaml", "study.yaml is a study file; what reads it: study plan"),
        ("train debug data.path=runs/a --dry-run", "runs/a is a run; what reads it: resume"),
        ("study plan runs/a/checkpoints/step-00000002", "step-00000002 is a checkpoint; what reads it: branch"),
        ("plan --law results.csv --params 1M --tokens 1B", "results.csv is a table"),
        ("plan fit.json", "fit.json is a fitted law; what reads it: plan --law"),
        ("judge results.csv", ""),  # the right kind, and wrong inside
        ("train debug qat.bit=3 data.path=data output=runs/a", ""),
        ("train debug qat.bit=3 name=", ""),  # no path, in a folder of runs
        ("train debug qat.bit=3 name=a", ""),
    ],
)
def test_a_path_of_another_kind_is_named_with_what_reads_it(
    typed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "results.csv": "n_params\n", "runs/a/run.json": "{}", "runs/a/checkpoints/step-00000002/manifest.json": "{}",
        "b/run.json": "{}", "data/manifest.json": "{}", "study.yaml": "sizes: [debug]\n",
        "fit.json": '{"coefficients": 1}',
    }  # fmt: skip
    for name, text in contents.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    code, _, error = run_command(shlex.split(typed))
    assert code == EXIT_BAD_INPUT
    assert said in error
    assert ("hint: " in error) == bool(said)


def test_other_processes_of_a_job_speak_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the first one has printed it and the launcher has ended them, unless only they have met it."""
    waited: list[float] = []
    monkeypatch.setattr("qatscale.cli.time.sleep", waited.append)
    job = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    code, out, error = run_command(["train", "debgu"])
    assert (code, out) == (EXIT_BAD_INPUT, "")
    assert error.startswith("error: recipe = 'debgu'")
    assert error.endswith("(process 1)\n")
    assert waited == [5.0]
