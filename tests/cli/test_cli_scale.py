"""`qatscale train … --dry-run` as a person sees it: its numbers at 80 columns, its refusals, its speed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qatscale.config.recipe import load_run_config
from qatscale.data.open import open_batches
from qatscale.schedule.build import build_timeline
from qatscale.train.setup import decide
from tests.cli.bad_inputs import run_command

NETWORK_BOUND = "train 8b --dry-run --processes 64 --mfu 0.4 batch.micro_batch=1 --gpu"
GPU = "H100 80GB HBM3"


def run(*arguments: str, then: str = "") -> subprocess.CompletedProcess[str]:
    code = f"from qatscale.cli import main\nimport sys\ntry:\n    main({list(arguments)!r})\nfinally:\n    pass; {then}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_dry_run_needs_neither_torch_nor_gpus() -> None:
    arguments = ("train", "8b", "--dry-run", "--processes", "64", "--json")
    done = run(*arguments, then="assert 'torch' not in sys.modules")
    assert "AssertionError" not in done.stderr
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["scale"]["processes"] == 64
    assert found["timeline"]["steps"] == 38_147


def test_the_dry_run_ends_with_2_where_it_does_not_fit() -> None:
    code, out, error = run_command(["train", "2p2b", "--dry-run", "--gpu", "L4"])
    assert code == 2
    assert "has 24 GB; a process needs" in error
    assert "fullest moment of a step" in out


def test_the_dry_run_ends_with_2_where_the_host_is_too_small() -> None:
    code, out, error = run_command(["train", "8b", "--dry-run", "--processes", "64", "--host-memory", "10"])
    assert code == 2
    assert "a node of 8 needs" in error
    assert "host memory of a node of 8" in out


@pytest.mark.parametrize("option", ["--gpu", "--network", "--host-memory"])
def test_its_options_belong_to_it(option: str) -> None:
    code, _, error = run_command(["train", "debug", option, "1"])
    assert code == 2
    assert "has no effect without --dry-run" in error


def test_network_and_host_are_in_the_output_and_in_the_json() -> None:
    words = [*NETWORK_BOUND.split(), GPU]
    _, out, _ = run_command(words)
    _, text, _ = run_command([*words, "--json"])
    scale = json.loads(text)["scale"]
    seconds = scale["network"]["seconds"]
    assert seconds == pytest.approx(sum(scale["traffic"].values()) / 50e9)
    assert f"50 GB/s a GPU between nodes: {seconds:.3g} s a step" in out
    assert scale["network_advice"] in out
    assert f"host memory of a node of 8: {scale['host']['total'] / 1e9:.3g} GB" in out
    assert scale["step_seconds"] > 2 * scale["compute_seconds"]


def test_fp32_on_a_gpu_comes_with_the_bf16_file() -> None:
    _, out, _ = run_command(["train", "debug", "--dry-run", "--gpu", "H200", "engine.ds_config=zero3_fp32"])
    assert "engine.ds_config=zero3_bf16" in out
    assert "_bf16" not in run_command(["train", "debug", "--dry-run"])[1]


@pytest.mark.parametrize("mix", [[], ["data.mix={data: 1}"]])
def test_data_that_repeat_are_reported_as_at_a_start(prepared: Path, mix: list[str]) -> None:
    overrides = [f"data.path={prepared.parent if mix else prepared}", *mix, "tokens=2M"]
    config = load_run_config("debug", overrides)
    timeline = build_timeline(config)
    reader = open_batches(config, timeline)
    length, sequences = (
        config.data.sequence_length,
        reader.manifest.splits["train"].tokens // config.data.sequence_length,
    )
    epochs = timeline.steps * config.batch.sequences / sequences
    warning = f"{'data repeats' if mix else 'the data repeat'}: {epochs:.2f} epochs of {sequences * length:,} tokens"
    _, out, _ = run_command(["train", "debug", *overrides, "--dry-run"])
    assert f"warning: {warning}; beyond about 4 epochs" in " ".join(out.split())
    assert decide(config).notices[-1].startswith(warning)


@pytest.mark.parametrize("recipe", ["759m", "2p2b", "8b"])
def test_large_recipes_do_not_wait_for_the_network_on_a_node(recipe: str) -> None:
    """They fit into 80 GB on eight GPUs, where a step takes at most 5 % longer than its arithmetic."""
    words = ["train", recipe, "--dry-run", "--processes", "8", "--mfu", "0.4", "--gpu", GPU, "--json"]
    scale = json.loads(run_command(words)[1])["scale"]
    assert scale["fits"]
    assert scale["step_seconds"] < 1.05 * scale["compute_seconds"]


NUMBER = re.compile(r"(?<![\w.])\d[\d,.]*\d(?:e[+-]\d+)?|\d")


def printed(words: list[str], columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines on a terminal of so many columns, without their colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run_command(words)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in out.splitlines()]


@pytest.mark.parametrize(
    "typed",
    [
        f"{NETWORK_BOUND} {GPU.replace(' ', '_')}",
        "train 2p2b --dry-run engine.pipeline_stages=8 engine.ds_config=zero1_bf16 --processes 64",
        "train 2p2b --dry-run engine.tensor_parallel=2 engine.pipeline_stages=2 engine.ds_config=zero1_bf16",
        "train debug --dry-run model.layers=9223372036854775807",
    ],
)
def test_no_number_is_cut_at_80_columns(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word.replace("_80GB_", " 80GB ") for word in typed.split()]
    narrow, wide = (printed(words, columns, monkeypatch) for columns in (80, 240))
    assert max(map(len, narrow)) <= 80
    whole = set(NUMBER.findall(" ".join(wide)))
    shown = NUMBER.findall(" ".join(narrow))
    assert [number for number in shown if number not in whole] == []
    assert "…" not in "".join(narrow)


@pytest.mark.parametrize(
    "overrides",
    [
        "model.layers=18446744073709551616",
        "model.layers=9223372036854775807",
        "model.layers=9223372036854775807 engine.pipeline_stages=4",
        "model.layers=9223372036854775807 engine.pipeline_stages=4611686018427387904",
        "model.heads=2305843009213693952 model.hidden_size=4611686018427387904 engine.tensor_parallel=3",
        "batch.sequences=4611686018427387905 batch.micro_batch=4611686018427387904 tokens=1e24",
    ],
)
def test_sizes_beyond_any_device_are_answered_at_once(overrides: str) -> None:
    began = time.process_time()
    code, _, error = run_command(["train", "debug", "--dry-run", *overrides.split()])
    assert time.process_time() - began < 5
    assert code in (0, 2)
    assert "Traceback" not in error


def test_the_checkpoint_to_branch_from_is_looked_at(tmp_path: Path) -> None:
    code, _, error = run_command(["train", "debug", "--dry-run", "--branch-from", str(tmp_path / "nosuch")])
    assert code == 2
    assert "nosuch" in error
