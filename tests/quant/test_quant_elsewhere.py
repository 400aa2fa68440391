"""The plugin in other people's loops: names of other architectures, transformers' Trainer, accelerate, the export."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from qatscale.config.schema import QatConfig
from qatscale.engine.trainer_callback import FILE, QatCallback, masters_of
from qatscale.errors import UserError
from qatscale.export.export import export
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.plugin import NothingQuantizedError, PlainMasters, QatPlugin
from qatscale.quant.selection import fake_quant_modules
from tests.processes import run

QAT = QatConfig(scheme="fused", bits=2)
FUSED = ["query_key_value", "*.attention.dense", "dense_h_to_4h", "dense_4h_to_h"]


def neox(tied: bool) -> GPTNeoXForCausalLM:
    """q, k and v in one matrix, and no name of a Llama."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_attention_heads=4, tie_word_embeddings=tied))


def a_qwen(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=128, max_position_embeddings=32, tie_word_embeddings=True,
        )
    )  # fmt: skip


# --- names ---


@pytest.mark.parametrize("tied", [True, False])
def test_patterns_reach_layers_of_other_names(tied: bool) -> None:
    include = [*FUSED, "embed_*"]
    model = neox(tied)
    QatPlugin(QAT, 0, include=include).prepare(model)
    bits = {name.rsplit(".", 1)[-1]: layer.quantizer.bits for name, layer in fake_quant_modules(model)}
    blocks = {"query_key_value": 2, "dense": 2, "dense_h_to_4h": 2, "dense_4h_to_h": 2}
    assert bits == blocks | ({"embed_in": 4, "lm_head": 4} if tied else {})


def test_what_a_pattern_leaves_out_stays_and_the_rest_is_an_error() -> None:
    with pytest.raises(UserError, match=r"include=\['\*\.qkv'\]"):
        QatPlugin(QAT, 0).prepare(neox(tied=False))
    with pytest.raises(UserError, match=r"embed_in.*stay in full precision.*exclude=\['embed_in'\]"):
        QatPlugin(QAT, 0, include=FUSED).prepare(neox(tied=False))
    with pytest.raises(UserError, match=r"include=….*'\*\.qqq'.*matches no layer"):
        QatPlugin(QAT, 0, include=["*.qqq"]).prepare(neox(tied=False))
    model = neox(tied=False)
    QatPlugin(QAT, 0, include=FUSED, exclude=["embed_*", "gpt_neox.layers.1.*"]).prepare(model)
    assert {name.split(".")[2] for name, _ in fake_quant_modules(model)} == {"0"}


def test_a_layer_that_is_no_linear_cannot_be_included() -> None:
    model = neox(tied=False)
    model.gpt_neox.layers[0].mlp.conv = nn.Conv1d(4, 4, 1)
    with pytest.raises(UserError, match=r"Conv1d.*only a plain nn\.Linear"):
        QatPlugin(QAT, 0, include=[*FUSED, "embed_*", "conv"]).prepare(model)


# --- loops ---


class Rows(torch.utils.data.Dataset):
    """Sequences that count up in steps of 1 to 5."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(16) * (1 + index % 5) + index) % 64
        return {"input_ids": row, "labels": row}


def trainer_of(folder: Path, model: nn.Module, plugin: QatPlugin, **arguments: object) -> tuple[Trainer, QatCallback]:
    plugin.prepare(model)
    callback = QatCallback(plugin)
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    args = TrainingArguments(output_dir=str(folder), save_steps=3, logging_steps=1, **(settings | arguments))
    optimizer = callback.adamw(3e-3, weight_decay=0.1)
    trainer = Trainer(model, args, train_dataset=Rows(), optimizer_cls_and_kwargs=optimizer, callbacks=[callback])
    return trainer, callback


def test_the_trainer_switches_at_its_step_trains_scales_and_resumes_quantized(tmp_path: Path) -> None:
    """The same losses as a plain loop; and a Trainer that resumes after the switch ends with the same weights."""
    model, plugin = a_qwen(), QatPlugin(QAT, 2)
    trainer, _ = trainer_of(tmp_path / "out", model, plugin, data_seed=1)
    trainer.train()
    assert plugin.switched_at == 2
    saved = json.loads((tmp_path / "out/checkpoint-3" / FILE).read_text())
    assert saved["switched_at"] == 2

    again, other = a_qwen(seed=1), QatPlugin(QAT, 2)
    resumed, _ = trainer_of(tmp_path / "out", again, other, data_seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert other.switched_at == 2
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    elsewhere, _ = trainer_of(tmp_path / "elsewhere", a_qwen(seed=1), QatPlugin(QAT, 2), data_seed=1)
    with pytest.raises(UserError, match="the scales of the checkpoint would be set anew"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_under_deepspeed_is_the_trainer_alone(stage: int, tmp_path: Path) -> None:
    model, plugin = a_qwen(), QatPlugin(QAT, 2)
    trainer, _ = trainer_of(tmp_path / "alone", model, plugin, per_device_train_batch_size=4)
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    finished = run([Path(__file__).with_name("quant_trainer_worker.py"), tmp_path, str(stage)], 2, cwd=tmp_path)
    assert finished.codes == [0, 0], finished.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["switched_at"] == 2
    assert "Use ZeroMasters" in found["refused"]
    assert found["losses"] == pytest.approx(expected, rel=2e-3)
    plugin.export(model, tmp_path / "alone-model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "alone-model")
    tokens = Rows()[0]["input_ids"][None]
    with torch.no_grad():
        assert theirs(tokens).logits.argmax(-1).equal(ours(tokens).logits.argmax(-1))


def test_masters_of_what_accelerate_wraps_are_plain() -> None:
    from accelerate import Accelerator

    model, plugin = a_qwen(), QatPlugin(QAT, 0)
    plugin.prepare(model)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(plugin.parameter_groups(1e-3))
    prepared, wrapped = accelerator.prepare(model, optimizer)
    masters = masters_of(wrapped, model)
    assert isinstance(masters, PlainMasters)
    assert plugin.maybe_switch(0, masters)
    row = Rows()[1]["input_ids"][None]
    accelerator.backward(prepared(input_ids=row, labels=row).loss)
    wrapped.step()
    plugin.check_moving(masters)


# --- shipping ---


def test_a_model_of_the_plugin_ships_in_every_format(tmp_path: Path) -> None:
    """The folder computes as the trained model does, and `qatscale export` keeps its codes and scales."""
    model, plugin = a_qwen(), QatPlugin(QAT, 0)
    plugin.prepare(model)
    with pytest.raises(NothingQuantizedError, match="has not switched"):
        plugin.export(model, tmp_path / "early")
    plugin.maybe_switch(0, PlainMasters(torch.optim.AdamW(model.parameters())))
    plugin.export(model, tmp_path / "shipped")
    tokens = Rows()[3]["input_ids"][None]
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shipped")
        assert torch.equal(loaded(tokens).logits, expected)
        options: dict[str, object] = {"tokenizer": "none", "verify": False}
        export(str(tmp_path / "shipped"), tmp_path / "hf", format="hf", **options)  # type: ignore[arg-type]
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert (again(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    described = export(str(tmp_path / "shipped"), tmp_path / "gguf", format="gguf", **options)  # type: ignore[arg-type]
    assert {row["stored_as"] for row in described["storage"] if row["bits"] == 2} == {"Q2_K"}
    assert [path.name for path in (tmp_path / "gguf").glob("*.gguf")] == ["shipped-Q2_K.gguf"]
    assert "with qatscale's plugin" in (tmp_path / "gguf/README.md").read_text()
    from gguf import GGUFReader, dequantize

    held = {t.name: t for t in GGUFReader(tmp_path / "gguf/shipped-Q2_K.gguf").tensors}
    tensor = held["blk.0.attn_q.weight"]
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        weight = fake_quantize(layer.quantizer, layer.weight, layer.weight_scale)
    off = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)) - weight
    assert off.abs().max() <= 2.0**-10 * weight.abs().max(), "scales are stored in fp16"


def test_an_export_of_the_plugin_is_verified_on_given_data(tmp_path: Path, prepared: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    model = Qwen3ForCausalLM(
        Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    )
    plugin = QatPlugin(QAT, 0, exclude=["o_proj"])
    plugin.prepare(model)
    plugin.maybe_switch(0, PlainMasters(torch.optim.AdamW(model.parameters())))
    plugin.export(model, tmp_path / "shipped")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"model\.norm\.weight is not finite"):
        plugin.export(model, tmp_path / "spoilt")
    assert not (tmp_path / "spoilt").exists()
    given = {"tokenizer": "none", "tokens": 512}
    with pytest.raises(UserError, match="--data FOLDER"):
        export(str(tmp_path / "shipped"), tmp_path / "out", **given)  # type: ignore[arg-type]
    given |= {"data": prepared, "license": "apache-2.0"}
    out = export(str(tmp_path / "shipped"), tmp_path / "out", **given)  # type: ignore[arg-type]
    assert out["verification"]["passed"]
    card = ModelCard((tmp_path / "out/README.md").read_text()).data
    assert (card.license, card.metrics, card.library_name) == ("apache-2.0", ["perplexity"], "transformers")
    losses = {result.metric_type: result.metric_value for result in card.eval_results or []}
    assert losses["loss"] == pytest.approx(out["verification"]["stored_loss"], abs=1e-4)
    assert losses["perplexity"] == pytest.approx(math.exp(out["verification"]["stored_loss"]), rel=1e-4)
    assert {row["name"]: row["bits"] for row in out["tensors"]}["blocks.0.attention.o.weight"] is None


def test_a_damaged_folder_of_the_plugin_is_named(tmp_path: Path) -> None:
    model, plugin = a_qwen(), QatPlugin(QAT, 0)
    plugin.prepare(model)
    plugin.maybe_switch(0, PlainMasters(torch.optim.AdamW(model.parameters())))
    plugin.export(model, tmp_path / "shipped")
    for damage in ("{}", '{"qat": {}, "bits": [], "switched_at": 0, "group_size": null}', '{"qat": {"bits": 99}}'):
        (tmp_path / "shipped/qat.json").write_text(damage)
        with pytest.raises(UserError, match=r"qat\.json or qat_scales\.safetensors is damaged"):
            export(str(tmp_path / "shipped"), tmp_path / "out", tokenizer="none", verify=False)
