"""What a person types first, and what a terminal shows when the machine fails."""

from __future__ import annotations

import json
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import qatscale
from qatscale.cli import completion
from qatscale.cli.terminal import as_overrides
from qatscale.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.evaluate import evaluate_checkpoint
from tests.cli.bad_inputs import run_command
from tests.processes import unlaunched


def test_the_version() -> None:
    assert run_command(["--version"]) == (0, f"qatscale {qatscale.__version__}\n", "")


@pytest.mark.parametrize(
    ("typed", "overrides"),
    [
        ("tokens=1K --deepspeed a.json qat.bits=2", "tokens=1K engine.ds_config=a.json qat.bits=2"),
        ("--deepspeed --deepspeed_config a.json", "engine.ds_config=a.json"),
        ("--deepspeed_config=a=b.json", "engine.ds_config=a=b.json"),
        ("--deepspeed tokens=1K", "tokens=1K"),
        ("--deepspeed", ""),
        ("--qat.bits=2", "--qat.bits=2"),
    ],
)
def test_a_ds_config_as_other_programs_take_it(typed: str, overrides: str) -> None:
    assert as_overrides(typed.split()) == overrides.split()


def test_a_ds_config_without_a_file() -> None:
    with pytest.raises(UserError, match="takes the path of a ds_config"):
        as_overrides(["--deepspeed_config"])


def test_a_full_disk_is_one_sentence_and_dry_runs_say_where_a_run_would_go_on(prepared: Path, tmp_path: Path) -> None:
    """A limit on the size of files stops the checkpoint at the switch, as a full disk does."""
    settings = f"output={tmp_path} data.path={prepared} tokens=2560 tracking.uri=none checkpoint.background=false"
    words = shlex.split(f"train debug name=run {settings}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, out, error = run_command(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == EXIT_FAILED
    assert re.fullmatch(r"error: the checkpoint of step 5 [^\n]+: File too large: [^\n]+\nlog: \S+rank-0\.log\n", error)
    assert "Traceback" not in out
    assert "Traceback" in Path(error.split("log: ")[1].strip()).read_text()

    run = tmp_path / "run"
    code, out, error = run_command(["resume", str(run), "--dry-run"])
    assert code == 0, error
    assert "begins at step 0" in out
    assert run_command(words)[0] == 0
    assert f"{run} is done: nothing was left to train" in run_command(words)[1]
    assert f"{run} is done: nothing is left to train" in run_command(["resume", str(run), "--dry-run"])[1]
    out = run_command(["evaluate", str(run), "--tokens", "256"])[1]
    assert {"full", "quantized", "validation", "perplexity"} <= set(out.split())
    told: list[str] = []
    evaluate_checkpoint(str(run), (2,), progress=told.append)
    assert re.fullmatch(r"ptq2 view: batch (\d+) of \1", told[-1])
    assert told[0].startswith("fp view: batch 1 of ")
    branch = ["branch", f"{run}@5", "name=branch", "tokens=5120", "--dry-run"]
    code, out, error = run_command(branch)
    assert code == 0, error
    assert "begins at step 5 of " in out
    assert "in 20 steps of 256" in out
    assert run_command([*branch, "batch.sequences=7"])[0] == EXIT_BAD_INPUT
    code, out, error = run_command([*words, "name=small", "model.vocab_size=99", "--dry-run"])
    assert (code, out) == (EXIT_BAD_INPUT, "")
    assert "model.vocab_size = 99: smaller than the vocabulary of the data" in error
    long = ["name=long", "data.sequence_length=9999999", "tokens=100B", "schedule.warmup_tokens=100M", "--dry-run"]
    assert "and one sequence takes 10000000" in run_command([*words, *long])[2]
    code, out, _ = run_command([*words, "optimizer.learning_rate=0.001", "--dry-run"])
    assert code == 0, "a plan may have the name of an existing run"
    assert "training will need another name=NAME" in out
    assert not (tmp_path / "branch").exists()


def test_training_goes_on_when_nobody_reads_any_more(prepared: Path, tmp_path: Path) -> None:
    """`qatscale train … | head -1`"""
    settings = f"output={tmp_path} data.path={prepared} tokens=2560 tracking.uri=none"
    command = [sys.executable, "-c", "from qatscale.cli import main; main()"]
    command += shlex.split(f"train debug name=run {settings}")
    process = subprocess.Popen(command, env=unlaunched(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run: ")
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert RunFolder(tmp_path / "run").is_done


def test_output_that_a_full_disk_lost_is_told() -> None:
    command = [sys.executable, "-m", "qatscale", "recipes"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (EXIT_FAILED, 1)
    assert ended.stderr.startswith("error: No space left on device. ")


def test_the_tab_key_offers_recipes_runs_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/first", "runs/second", "other/third", "data"):
        (tmp_path / folder).mkdir(parents=True)
        if folder != "data":
            (tmp_path / folder / "run.json").touch()
    (tmp_path / "mine.yaml").touch()
    assert completion.run("") == ["runs/first", "runs/second"]
    assert completion.run("o") == ["other/"]
    assert completion.run(f"{tmp_path}/other/") == [f"{tmp_path}/other/third"]
    assert completion.run("nowhere/") == []
    assert completion.recipe_or_file("de") == ["debug"]
    assert completion.recipe_or_file("m") == ["mine.yaml"]
    assert completion.override("qat.b") == ["qat.bits="]
    assert {"qat", "qat.bits", "quickstart"} <= set(completion.recipe_or_key("q"))
    asked = {"_QATSCALE_COMPLETE": "complete_bash", "COMP_WORDS": "qatscale train debug tok", "COMP_CWORD": "3"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert run_command([])[1].split() == ["tokens="]


@pytest.mark.parametrize(
    "typed",
    ["train 86m --dry-run --gpu X1", "train 86m --dry-run --mfu 0.4", "train 86m --dry-run --gpu-memory 0",
     "train 86m --dry-run --processes 3", "train 86m --dry-run --figure a.txt", "train 86m --dry-run --peak-flops x"],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_else(typed: str) -> None:
    code, out, error = run_command(typed.split())
    assert (code, out) == (EXIT_BAD_INPUT, ""), error


def test_a_gpu_that_is_in_no_table() -> None:
    known = run_command(["train", "86m", "--dry-run", "--gpu", "H200", "--mfu", "0.4", "--json"])[1]
    given = ["--gpu-memory", "141", "--peak-flops", "989T", "--mfu", "0.4"]
    code, out, error = run_command(["train", "86m", "--dry-run", *given, "--json"])
    assert code == 0, error
    mine, theirs = (json.loads(text)["scale"] for text in (out, known))
    for key in ("gpu_memory", "tokens_per_second", "fits"):
        assert mine[key] == theirs[key]
    code, _, error = run_command(["train", "86m", "--dry-run", "--gpu-memory", "10"])
    assert code == EXIT_BAD_INPUT
    assert "--gpu-memory = 10.0: has 10 GB; a process needs 12.4 GB" in error
