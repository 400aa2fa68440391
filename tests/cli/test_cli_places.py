"""Places that may not be read or written: one sentence that names them, exit status 2, and nothing is left."""

from __future__ import annotations

import json
import resource
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatscale.errors import EXIT_BAD_INPUT, EXIT_FAILED
from tests.cli.bad_inputs import copy_world, run_command
from tests.permissions import as_ordinary_user

TABLE = "fit --table table.csv --form qat_per_bits --no-compare --resamples 0"
NOT_WRITABLE = {
    "convert runs/trunk --to universal --out locked/out": "locked/out",
    "report --table table.csv --form qat_per_bits --no-compare --resamples 0 --out locked/report": "locked/report",
    "compare runs/trunk --figure locked/a.png": "locked/a.png",
    "train debug data.path=data --dry-run --figure locked/a.png": "locked/a.png",
    "train debug data.path=data tracking.uri=none name=x output=locked": "locked",
    "prepare corpus.jsonl --vocab-size 512 --workers 1 --out locked/data": "locked/data",
    "study run study.yaml --workers 1 --out locked/study": "locked/study",
}
STEP = "runs/trunk/checkpoints/step-00000010"
NOT_READABLE = {
    "train debug data.path=data tracking.uri=none name=x": ("data", "data/manifest.json", "data/train-00000.bin"),
    "evaluate runs/trunk": (STEP, f"{STEP}/manifest.json", f"{STEP}/shard-00000-of-00001.safetensors"),
    "convert runs/trunk --to hf --out out": ("runs/trunk/recipe.yaml", "runs/trunk"),
    "compare runs/trunk": ("runs/trunk/run.json", "runs/trunk/metrics.jsonl", "runs/trunk/done.json"),
    "prepare corpus.jsonl --vocab-size 512 --workers 1 --out out": ("corpus.jsonl",),
    "study plan study.yaml": ("study.yaml",),
    "train debug engine.ds_config=clash.json --dry-run": ("clash.json",),
    TABLE: ("table.csv",),
}


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path.resolve() / "here"
    copy_world(world, folder)
    monkeypatch.chdir(folder)
    Path("study.yaml").write_text("sizes: [debug]\ntokens: [25600]\nbits: [2]\nfractions: [0.5]\n")
    rows = [f"86e6,4,{k}e9,{k}e8,{3.5 - k / 10},fused" for k in range(1, 9)]
    Path("table.csv").write_text("\n".join(["n_params,bits,tokens_fp,tokens_qat,loss,scheme", *rows]))
    Path("locked").mkdir(mode=0o500)
    return folder


def refused(typed: str, place: str) -> None:
    with as_ordinary_user():
        code, out, error = run_command(shlex.split(typed))
    assert "Traceback" not in out + error
    assert (code, Path(place).name in error) == (EXIT_BAD_INPUT, True), f"{typed}: {code}: {error}"
    assert len(error.splitlines()) <= 2, error


@pytest.mark.usefixtures("here")
def test_a_place_is_looked_at_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for work in ("qatlaw.summary.summarise", "qatlaw.page.compose", "qatlaw.judge.judge"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr("qatscale.export.export.open_source", lambda *_, **__: pytest.fail("the work began"))
    for command in ("fit --table table.csv --out", "report --table table.csv --out", "judge --out"):
        refused(f"{command} corpus.jsonl/x/y", "corpus.jsonl")
    refused("fit --table table.csv --out locked", "locked")
    refused("fit --table table.csv --out locked/fit.json", "locked")
    refused("export runs/trunk --format hf --out locked/out", "locked")


def test_where_nothing_may_be_written(here: Path) -> None:
    for typed, place in NOT_WRITABLE.items():
        refused(typed, place)
    assert list((here / "locked").iterdir()) == []


@pytest.mark.parametrize("typed", NOT_READABLE)
def test_what_may_not_be_read(typed: str, here: Path) -> None:
    for name in NOT_READABLE[typed]:
        path = here / name
        mode = path.stat().st_mode
        path.chmod(0)
        try:
            refused(typed, name)
        finally:
            path.chmod(mode)


def test_a_dry_run_looks_at_the_files_of_its_checkpoint(here: Path) -> None:
    shard = here / STEP / "shard-00000-of-00001.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    branch = "branch runs/trunk name=x data.path=data tokens=5120 qat.fraction=0.75 --dry-run"
    refused(branch, "shard-00000-of-00001.safetensors is missing")
    shard.write_bytes(content[:-1])
    refused(branch, f"has {len(content) - 1} bytes instead of {len(content)}")


def _documents(manifest: Any) -> None:
    train = manifest["splits"]["train"]
    train["documents"] += 1
    train["shards"][0]["documents"] += 1


def _tokens(manifest: Any) -> None:
    train = manifest["splits"]["train"]
    train["tokens"] -= 1
    train["shards"][0]["tokens"] -= 1


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (lambda manifest: manifest.update(dtype="int32"), "of uint16, and the manifest says"),
        (_documents, "documents, and the manifest says"),
        (_tokens, "tokens of uint16, and the manifest says"),
        (lambda manifest: manifest["tokenizer"].update(eos_id=3), "its last document ends with token 2"),
        (lambda manifest: manifest["tokenizer"].update(eos_id=512), "eos_id is 512, and the vocabulary has 512"),
    ],
    ids=["dtype", "documents", "tokens", "another eos_id", "no eos_id"],
)
def test_a_dry_run_finds_a_manifest_that_lies(lie: Callable[[Any], object], said: str, here: Path) -> None:
    path = here / "data/manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["checksum"]  # older versions wrote none
    lie(manifest)
    path.unlink()
    path.write_text(json.dumps(manifest))
    Path("study.yaml").write_text(Path("study.yaml").read_text() + "set: [data.path=data]\n")
    for typed in (
        "train debug data.path=data --dry-run",
        "branch runs/trunk name=x data.path=data tokens=5120 qat.fraction=0.75 --dry-run",
        "study plan study.yaml",
        "train debug data.path=data tracking.uri=none name=x",
    ):
        refused(typed, said)


def test_a_full_disk_leaves_no_part_of_a_folder(here: Path) -> None:
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        code, _, error = run_command(["launch-scripts", "jobs"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (code, "jobs: File too large" in error) == (EXIT_FAILED, True), error
    assert not list(here.glob("*jobs*"))


def test_a_list_of_runs_shows_those_that_may_be_read(here: Path) -> None:
    path = here / "runs/trunk/metrics.jsonl"
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with as_ordinary_user():
            code, out, error = run_command(["runs", "runs"])
    finally:
        path.chmod(mode)
    assert code == 0
    assert len(out.splitlines()) == 2 + len(list((here / "runs").iterdir())) - 1
    assert "warning: left out: runs/trunk/metrics.jsonl cannot be read: Permission denied." in error
