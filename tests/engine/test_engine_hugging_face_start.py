"""A folder of transformers becomes the start of a run: read exactly, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qatscale.config.recipe import load_run_config
from qatscale.data.manifest import Manifest
from qatscale.data.prepare import prepare
from qatscale.engine.checkpoints.files import list_checkpoints, newest_checkpoint, read_manifest
from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint
from qatscale.errors import EXIT_FAILED, UserError
from qatscale.export.export import export
from qatscale.model.hugging_face import hugging_face_names
from qatscale.schedule.build import build_timeline
from qatscale.tracking.compare import list_runs, run_folders
from qatscale.tracking.convert import convert
from qatscale.train.resume import plan_resume
from qatscale.train.setup import decide
from tests.cli.bad_inputs import run_command
from tests.engine.hugging_face_models import import_model, overrides, save_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_is_read_exactly(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    save_model(tmp_path / "hf", tied, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == dtype
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    (tmp_path / "data").mkdir()
    import_model(tmp_path / "hf", tmp_path / "run", "data.path=null")
    reader = CheckpointReader(find_checkpoint(tmp_path / "run"))
    config = load_run_config(tmp_path / "run/recipe.yaml")
    for ours, name in hugging_face_names(config.model).items():
        assert torch.equal(reader.parameter(ours), theirs.get_parameter(name).float()), name


def test_shards_are_bounded_and_hold_every_slice_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatscale.engine.checkpoints.training_state.SHARD_BYTES", 40_000)
    save_model(tmp_path / "hf", tied=True)
    import_model(tmp_path / "hf", tmp_path / "run", "data.path=null")
    checkpoint = find_checkpoint(tmp_path / "run")
    keys: list[str] = []
    for name in read_manifest(checkpoint).files:
        with safe_open(checkpoint / name, "pt") as file:
            keys += file.keys()
            held = [file.get_slice(key).get_shape()[0] * 4 for key in file.keys()]  # noqa: SIM118 - not a dict
            assert sum(held) <= 40_000 or len(held) == 1
    assert len(keys) == len(set(keys)) == len(read_manifest(checkpoint).parameters)


def test_trained_tokens_are_steps_of_the_recipe(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", tied=True)
    import_model(tmp_path / "hf", tmp_path / "run", "data.path=null", trained_tokens=2600)  # 5.08 steps of 512
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000005"]
    (row,) = list_runs(run_folders(tmp_path))[0].values()
    assert (row.step, row.tokens) == (5, 2560)
    # Nothing is trained here: what the model has seen may exceed the recipe's tokens, by nine digits of steps too.
    import_model(tmp_path / "hf", tmp_path / "late", "data.path=null", trained_tokens=15 * 10**12)
    assert find_checkpoint(f"{tmp_path}/late@29296875000") == newest_checkpoint(tmp_path / "late/checkpoints")
    late = load_run_config(tmp_path / "late/recipe.yaml", ["name=more", f"output={tmp_path}"])
    with pytest.raises(UserError, match=r"Train on more tokens"):
        plan_resume(late, build_timeline(late), str(tmp_path / "late"))
    more = load_run_config(tmp_path / "late/recipe.yaml", ["name=more", f"output={tmp_path}", "tokens=15.01T"])
    plan = plan_resume(more, build_timeline(more), str(tmp_path / "late"))
    assert plan is not None
    assert plan.step == 29_296_875_000


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", tied=True)
    file = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    held = load_file(file)
    name = sorted(held)[0]
    held[name].view(-1)[-1] = float("nan")
    save_file(held, file)
    with pytest.raises(UserError, match=f"{re.escape(name)} holds NaN"):
        import_model(tmp_path / "hf", tmp_path / "run", "data.path=null")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_overflows_is_a_failure(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", tied=True)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        save_file({name: tensor.sign() * 1e38 for name, tensor in load_file(file).items()}, file)
    import_model(tmp_path / "hf", tmp_path / "run", "data.path=null")
    (tmp_path / "a.txt").write_text("\n".join(f"some words {i} and more" for i in range(999)))
    prepare([str(tmp_path / "a.txt")], tmp_path / "data", vocab_size=300, text_unit="line", workers=1)
    code, out, error = run_command(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "data")])
    assert (code, out) == (EXIT_FAILED, "")
    assert "the validation loss is not finite in full precision" in error


def test_a_window_that_the_sequences_do_not_fit_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", tied=True)
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_sliding_window": True, "sliding_window": 64}))
    state = import_model(tmp_path / "hf", tmp_path / "run", "data.path=null")
    assert any("window of 64" in note for note in state.notes)
    with pytest.raises(UserError, match=r"data\.sequence_length = 128.*64 positions") as caught:
        import_model(tmp_path / "hf", tmp_path / "long", "data.path=null", "data.sequence_length=128")
    assert "data.sequence_length=64" in caught.value.fix


def test_the_shape_is_the_folders_alone(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", tied=False)
    with pytest.raises(UserError, match=r"model\.layers = '3'.*config\.json decides it"):
        import_model(tmp_path / "hf", tmp_path / "run", "data.path=null", "model.layers=3")


def test_data_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """Where the model is imported, and where its branch meets other data. Another end of documents is no other one."""
    save_model(tmp_path / "hf", tied=True)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"some words {i} and more"}) for i in range(99)))
    for name, size in (("own", 300), ("other", 290)):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / name, vocab_size=size, workers=1)
    shutil.copy(tmp_path / "own/tokenizer/tokenizer.model", tmp_path / "hf")
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "ends", tokenizer=str(tmp_path / "hf"), eos="<s>", workers=1)
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        import_model(tmp_path / "hf", tmp_path / "run", f"data.path={tmp_path}/other")
    for name in ("own", "ends"):
        import_model(tmp_path / "hf", tmp_path / f"run-{name}", f"data.path={tmp_path}/{name}")
    export(str(tmp_path / "run-own"), tmp_path / "out", verify=False)
    card = ModelCard((tmp_path / "out/README.md").read_text()).data
    assert (card.base_model, card.datasets, card.license) == ("hf", ["a.jsonl"], "unknown")
    import_model(tmp_path / "hf", tmp_path / "run", "data.path=null")
    manifest = read_manifest(find_checkpoint(tmp_path / "run"))
    Manifest.load(tmp_path / "own").check_tokenizer(manifest.tokenizer)
    with pytest.raises(UserError, match=r"tokenized with .* was trained with"):
        Manifest.load(tmp_path / "other").check_tokenizer(manifest.tokenizer)
    branch = [*overrides(tmp_path), "name=x", f"data.path={tmp_path}/other"]
    config = load_run_config(tmp_path / "run/recipe.yaml", [*branch, "qat.fraction=0.5"])
    with pytest.raises(UserError, match=r"tokenized with .* was trained with"):
        decide(config, str(tmp_path / "run"))


def test_a_recipe_without_a_model_takes_the_folders(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", tied=False)
    text = (
        "name: x\ntokens: 10K\ndata: {sequence_length: 128}\nbatch: {sequences: 4, micro_batch: 4}\n"
        "optimizer: {learning_rate: 1e-3}\nqat: {scheme: fused, bits: 2, fraction: 0.5}\n"
    )
    (tmp_path / "mine.yaml").write_text(text)
    state = convert(str(tmp_path / "hf"), "checkpoint", tmp_path / "run", str(tmp_path / "mine.yaml"))
    config = load_run_config(tmp_path / "run/recipe.yaml")
    model = config.model
    assert (model.heads, model.kv_heads, model.tied_embedding, model.norm_eps) == (4, 2, False, 1e-5)
    assert config.qat.scheme == "fp", "nothing has been quantized yet"
    assert any("longer than the 64 positions" in note for note in state.notes)
    long = ["data.sequence_length=4096", "batch.sequences=1024", "checkpoint.keep_at=[5K]"]  # nothing is trained
    state = convert(str(tmp_path / "hf"), "checkpoint", tmp_path / "long", str(tmp_path / "mine.yaml"), long)
    assert any("a branch needs tokens=" in note for note in state.notes)
    assert build_timeline(load_run_config(tmp_path / "long/recipe.yaml")).steps == 1
    with pytest.raises(UserError, match="is the run's name too"):
        convert(str(tmp_path / "hf"), "checkpoint", tmp_path / ".hidden", str(tmp_path / "mine.yaml"))
