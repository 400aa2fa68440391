"""`qatscale convert`: nothing is lost on the way, and engines go on from what it writes as if nothing had happened."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from qatscale.config.recipe import load_run_config
from qatscale.data.open import open_batches
from qatscale.engine.checkpoints.files import read_manifest
from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint
from qatscale.engine.checkpoints.universal import LATEST, find_universal, read_universal, universal_checkpoint_info
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from qatscale.tracking.compare import list_runs, run_folders
from qatscale.tracking.convert import convert
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.resume import plan_resume
from tests.engine.hugging_face_models import import_model, overrides, save_model
from tests.processes import run
from tests.train.driving import SWITCH, assert_same_state, losses
from tests.train.fixed_tokens import write_fixed_tokens

pytestmark = pytest.mark.timeout(1200)
"""The first test that asks for `made` waits for both launches: a minute, and several on a busy machine."""

DRIVER = Path(__file__).with_name("convert_driver.py")
AT = 9
"""A checkpoint two steps after the switch, at the cooldown's start; three steps follow."""
QAT = [
    "tokens=2048",
    "schedule.warmup_tokens=512",
    "qat.scheme=fused",
    "qat.bits=2",
    "qat.fraction=0.75",
    "schedule.cooldown_fraction=0.25",
]
"""4 steps: one in full precision, three of QAT."""
LAYOUTS = {
    "tp2": ["engine.tensor_parallel=2"],
    "pp2": ["engine.pipeline_stages=2"],
}
TIED = {"tied": True, "untied": False}


@dataclass(frozen=True)
class Made:
    folder: Path
    results: dict[int, dict[str, Any]]
    """Processes -> what convert_driver.py saw on so many."""

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def tail(self, run: str) -> list[float]:
        """The losses of the last three steps."""
        return [loss for step, loss in losses(self.runs / run).items() if step > AT]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One launch on 1 process and one on 2: starting a process costs more than all that it does here."""
    folder = tmp_path_factory.mktemp("converted")
    write_fixed_tokens(folder / "data")
    for name, tied in TIED.items():
        save_model(folder / name, tied)
        import_model(folder / name, folder / "runs" / f"llama-{name}")
    branches = {
        "1": [[f"{name}-p1", f"llama-{name}", QAT] for name in TIED],
        "2": [
            [f"{name}-{layout}", f"llama-{name}", [*QAT, *said]] for name in TIED for layout, said in LAYOUTS.items()
        ],
    }
    asked = {"overrides": overrides(folder), "at": AT, "saved": {"1": [1], "2": [2]}, "branches": branches}
    (folder / "asked.json").write_text(json.dumps(asked | {"overrides": [*overrides(folder), "name=plain"]}))
    results = {}
    for ranks in (1, 2):
        finished = run([DRIVER, folder], ranks, cwd=folder, timeout=500)
        assert finished.codes == [0] * ranks, finished.output
        results[ranks] = json.loads((folder / f"result-{ranks}.json").read_text())
    return Made(folder, results)


# --- there and back ---


@pytest.mark.dist
@pytest.mark.parametrize("step", [SWITCH, AT])
def test_universal_and_back_is_the_same_bit_for_bit(step: int, made: Made, tmp_path: Path) -> None:
    convert(f"{made.runs}/whole@{step}", "universal", tmp_path / "uni")
    convert(str(tmp_path / "uni"), "checkpoint", tmp_path / "back")
    one, other = find_checkpoint(f"{made.runs}/whole@{step}"), find_checkpoint(tmp_path / "back")
    assert_same_state(other, one)
    before, after = read_manifest(one), read_manifest(other)
    for key in ("step", "tokens", "data", "plugin"):
        assert getattr(after, key) == getattr(before, key), key
    assert {record.adam_steps for record in after.parameters.values()} == ({7} if step == SWITCH else {9, 2})
    recipes = [load_run_config(folder / "recipe.yaml") for folder in (made.runs / "whole", tmp_path / "back")]
    assert recipes[1] == recipes[0].model_copy(update={"name": "back", "output": tmp_path})


@pytest.mark.dist
@pytest.mark.parametrize("way", ["checkpoint", "universal"])
def test_hugging_face_and_back_keeps_every_weight(way: str, made: Made, tmp_path: Path) -> None:
    source = f"{made.runs}/whole@{AT}" if way == "checkpoint" else str(made.folder / "universal")
    convert(source, "hf", tmp_path / "hf")
    said = [o for o in overrides(made.folder) if not o.startswith(("qat.", "output="))]
    convert(str(tmp_path / "hf"), "checkpoint", tmp_path / "back", "debug", said)
    before, after = (CheckpointReader(find_checkpoint(w)) for w in (f"{made.runs}/whole@{AT}", tmp_path / "back"))
    assert after.manifest.parameters.keys() == before.manifest.parameters.keys()
    for name, record in after.manifest.parameters.items():
        assert record.adam_steps == 0
        assert not after.parameter(name, "exp_avg").any()
        assert not after.parameter(name, "exp_avg_sq").any()
        inert = name.endswith("weight_scale")
        expected = torch.ones(record.shape) if inert else before.parameter(name)
        assert torch.equal(after.parameter(name), expected), name


# --- engines go on ---


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["1", "2"])
def test_deepspeed_reads_the_universal_layout_and_goes_on(ranks: int, stage: str, made: Made) -> None:
    seen = made.results[ranks]["loaded"][stage]
    assert seen["steps"] == AT
    assert "parameter_with_row_parallelism_patterns" in seen["info"]
    assert seen["losses"] == pytest.approx(made.tail("whole"), rel=1e-5)
    now = build_timeline(load_run_config(made.runs / "whole/recipe.yaml")).at(AT)
    for group in seen["groups"]:
        assert group["lr"] == pytest.approx(now.learning_rate * group["lr_ratio"])
        assert group["betas"] == list(now.betas)
        assert group["weight_decay"] == (now.weight_decay if group["name"] == "matrices" else 0.0)
    assert [group["name"] for group in seen["groups"]] == ["matrices", "norms", "scales_2bit", "scales_4bit"]


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "stage"), [(1, "1"), (2, "2")])
def test_a_checkpoint_of_deepspeeds_own_becomes_ours(ranks: int, stage: str, made: Made) -> None:
    """engine.save_checkpoint, DeepSpeed's ds_to_universal, convert: our loader goes on from it."""
    assert made.results[ranks]["saved"][stage] == pytest.approx(made.tail("whole"), rel=1e-5)
    back = made.runs / f"back-{ranks}-{stage}"
    before, after = read_manifest(find_checkpoint(f"{made.runs}/whole@{AT}")), read_manifest(find_checkpoint(back))
    assert_same_state(find_checkpoint(back), find_checkpoint(f"{made.runs}/whole@{AT}"))
    assert (after.step, after.data, after.plugin["switched_at"]) == (AT, before.data, SWITCH)
    assert made.tail(f"from-back-{ranks}-{stage}") == pytest.approx(made.tail("whole"), rel=1e-5)


@pytest.mark.dist
def test_deepspeeds_zero3_does_not_load_it_wrongly(made: Made) -> None:
    assert made.results[1]["zero3"] == "AssertionError"


@pytest.mark.dist
@pytest.mark.parametrize("name", TIED)
def test_qat_from_a_hugging_face_folder_is_the_same_on_every_layout(name: str, made: Made) -> None:
    alone = losses(made.runs / f"{name}-p1")
    assert list(alone) == [1, 2, 3, 4]
    assert [r["step"] for r in RunFolder(made.runs / f"{name}-p1").records("switch")] == [1]
    for layout in LAYOUTS:
        assert losses(made.runs / f"{name}-{layout}") == pytest.approx(alone, rel=1e-5), layout


@pytest.mark.dist
@pytest.mark.parametrize("name", TIED)
def test_its_first_loss_is_that_of_transformers(name: str, made: Made) -> None:
    config = load_run_config(made.runs / f"{name}-p1/recipe.yaml")
    batch = torch.from_numpy(open_batches(config, build_timeline(config)).batch(0))
    theirs = AutoModelForCausalLM.from_pretrained(made.folder / name)
    with torch.no_grad():
        logits = theirs(input_ids=batch[:, :-1]).logits
    expected = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
    assert losses(made.runs / f"{name}-p1")[1] == pytest.approx(expected, rel=1e-5)


# --- an imported run among others ---


@pytest.mark.dist
def test_an_imported_run_is_listed_as_one_and_not_trained(made: Made) -> None:
    rows = {row.name: row for row in list_runs(run_folders(made.runs))[0].values()}
    assert (rows["llama-tied"].status, rows["llama-tied"].parent) == ("imported", "tied")
    assert rows["tied-p1"].parent == "llama-tied@0"
    folder = RunFolder(made.runs / "llama-tied")
    assert folder.imported == str(made.folder / "tied")
    config = load_run_config(folder.path / "recipe.yaml")
    with pytest.raises(UserError, match="is branched from, not trained"):
        plan_resume(config, build_timeline(config))


# --- what is refused ---


class Evil:
    """A pickle that would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def a_universal(made: Made, out: Path) -> Path:
    """As from elsewhere: without what our own conversion writes beside it. The folder that holds zero/."""
    convert(f"{made.runs}/whole@{AT}", "universal", out)
    inner = out / f"step-{AT:08d}"
    (inner / "qatscale.json").unlink()
    return inner


@pytest.mark.dist
@pytest.mark.parametrize("file", ["fp32.pt", "exp_avg_sq.pt", "step.pt"])
def test_a_universal_folder_is_read_without_running_its_code(file: str, made: Made, tmp_path: Path) -> None:
    inner = a_universal(made, tmp_path / "uni")
    path, victim = inner / "zero/blocks.1.mlp.up.weight" / file, tmp_path / "was here"
    recipe = str(made.runs / "whole/recipe.yaml")
    for write in (lambda e: torch.save({"param": e}, path), lambda e: path.write_bytes(pickle.dumps(e))):
        write(Evil(victim))
        with pytest.raises(UserError, match="holds more than numbers"):
            convert(str(inner), "checkpoint", tmp_path / "out", recipe)
        assert not victim.exists()
        assert not (tmp_path / "out").exists()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("file", "problem"),
    [("fp32.pt", "fp32.pt is missing"), ("step.pt", "made from ZeRO-3"), (None, "lacks"), ("spoilt", "not finite")],
)
def test_a_universal_folder_that_lacks_something_is_refused(
    file: str | None, problem: str, made: Made, tmp_path: Path
) -> None:
    inner = a_universal(made, tmp_path / "uni")
    parameter = inner / "zero/blocks.0.attention.q.weight"
    if file == "spoilt":
        content = torch.load(parameter / "exp_avg.pt")
        content["param"][0, 0] = torch.nan
        torch.save(content, parameter / "exp_avg.pt")
    else:
        (parameter / file).unlink() if file else parameter.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=problem):
        convert(str(tmp_path / "uni"), "checkpoint", tmp_path / "out", str(made.runs / "whole/recipe.yaml"))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["qat.scheme=fp", "qat.fraction=auto"], "this recipe never switches"),
        (["qat.fraction=0.25"], "this recipe switches at step 9"),
        (["model.layers=3"], "lacks .* Is it the right recipe"),
        (["model.intermediate_size=256"], "has shape"),
    ],
)
def test_a_recipe_that_cannot_be_the_right_one_is_told(said: list[str], told: str, made: Made, tmp_path: Path) -> None:
    inner = a_universal(made, tmp_path / "uni")
    with pytest.raises(UserError, match=told):
        read_universal(inner, str(made.runs / "whole/recipe.yaml"), said)


@pytest.mark.dist
def test_where_a_run_stands_is_seen_from_its_scales_and_counts(made: Made, tmp_path: Path) -> None:
    recipe = made.runs / "whole/recipe.yaml"
    for step, switched in ((SWITCH, None), (AT, SWITCH)):
        convert(f"{made.runs}/whole@{step}", "universal", tmp_path / str(step))
        inner = tmp_path / f"{step}/step-{step:08d}"
        (inner / "qatscale.json").unlink()
        state = read_universal(inner, str(recipe))
        assert (state.step, state.plugin["switched_at"]) == (step, switched)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.dist
@pytest.mark.parametrize("to", ["universal", "hf", "checkpoint"])
def test_a_full_disk_leaves_nothing(to: str, made: Made, tmp_path: Path) -> None:
    source = str(made.folder / "universal") if to == "checkpoint" else f"{made.runs}/whole@{AT}"
    with full_disk(30_000), pytest.raises(OSError, match="File too large"):
        convert(source, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    convert(source, to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_patterns_say_how_tensor_parallelism_splits_every_parameter() -> None:
    info = universal_checkpoint_info(load_run_config("debug", ["model.tied_embedding=false", "qat.embedding_bits=8"]))
    assert info["original_vocab_size"] == 512
    assert set(info["parameter_with_row_parallelism_patterns"]) == {
        r"blocks\.\d+\.attention\.o\.weight$", r"blocks\.\d+\.mlp\.down\.weight$",
    }  # fmt: skip
    assert set(info["vocabulary_parameter_patterns"]) == {r"embed\.weight$", r"head\.weight$"}
    assert set(info["tp_replicated_parameter_patterns"]) == {
        r"norm\.weight$", r"blocks\.\d+\.attention_norm\.weight$", r"blocks\.\d+\.mlp_norm\.weight$",
        r"blocks\.\d+\.attention\.o\.weight_scale$", r"blocks\.\d+\.mlp\.down\.weight_scale$",
    }  # fmt: skip
    grouped = universal_checkpoint_info(load_run_config("debug", ["qat.group_size=32"]))
    assert r"blocks\.\d+\.mlp\.down\.weight_scale$" in grouped["parameter_with_row_parallelism_patterns"]


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 5000, "\0"])
def test_a_name_that_no_system_takes_is_no_universal_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / LATEST).write_text(name)
    assert find_universal(tmp_path) is None
