"""Logits, gradients and files against transformers' LlamaForCausalLM."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from qatscale.errors import UserError
from qatscale.model import hugging_face
from qatscale.model.hugging_face import (
    attention_window,
    export_hugging_face,
    from_hugging_face,
    hugging_face_config,
    hugging_face_names,
    model_type,
    open_hugging_face,
    save_safetensors,
    to_hugging_face,
)
from qatscale.model.hugging_face_tokenizer import SpecialIds
from qatscale.model.llama import Llama
from tests.model.model_shrunken import CONFIGS

LOGITS_OFF = 32 * 2.0**-24
"""Largest difference of two fp32 forward passes, relative to the largest logit. Each matrix product sums up to 88 terms
in an order of its library's choice, which is off by a few units of 2^-24; a few layers of them in a row."""


def peer(model: Llama, config) -> PreTrainedModel:
    """transformers' model with copies of our weights, through our converter, every name accounted for."""
    theirs = AutoModelForCausalLM.from_config(hugging_face_config(config, 64, SpecialIds(None, None), torch.float32))
    state = {name: tensor.clone() for name, tensor in to_hugging_face(model.state_dict(), config).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert set(missing) == ({"lm_head.weight"} if config.tied_embedding else set())
    assert not unexpected
    theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("length", [1, 7, 32, 65])
def test_logits_equal(config, build, batch, length):
    model = build(config)
    tokens, _ = batch(config, 2, length)
    with torch.no_grad():
        ours, theirs = model(tokens), peer(model, config)(input_ids=tokens).logits
    assert ours.abs().max() > 1
    off = (ours - theirs).abs().max() / ours.abs().max()
    assert off <= LOGITS_OFF, f"{off * 2**24:.1f} units of 2^-24"


def test_gradients_equal(config, build, batch):
    model = build(config)
    theirs = peer(model, config)
    tokens, labels = batch(config, 4, 19)
    loss = model(tokens, labels)
    loss.backward()
    logits = theirs(input_ids=tokens).logits
    their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    names = hugging_face_names(config)
    for name, parameter in model.named_parameters():
        expected = theirs.get_parameter(names[name]).grad
        off = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert off <= 4 * LOGITS_OFF, f"{name}: {off * 2**24:.1f} units of 2^-24"  # backward: twice the products again


def test_a_wrong_convention_would_show(build, batch):
    """The bound above is tight enough to see interleaved instead of half-split pairs, and another theta."""
    config = CONFIGS["gqa-tied"]
    model = build(config)
    theirs = peer(model, config)
    tokens, _ = batch(config, 2, 32)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        other_theta = build(config.model_copy(update={"rope_theta": 400_000.0}))(tokens)
        for block in model.blocks:
            for linear in (block.attention.q, block.attention.k):
                heads = linear.weight.view(-1, 2, 4, config.hidden_size)  # 8 channels a head
                linear.weight.copy_(heads.transpose(1, 2).reshape(linear.weight.shape))
        interleaved = model(tokens)
    for wrong in (other_theta, interleaved):
        assert (wrong - expected).abs().max() / expected.abs().max() > 10 * LOGITS_OFF


def test_both_directions_are_inverse_bit_for_bit(config, build):
    state = build(config).state_dict()
    theirs = to_hugging_face(state, config)
    assert ("lm_head.weight" in theirs) == (not config.tied_embedding)
    back = from_hugging_face(theirs, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    Llama(config).load_state_dict(back)  # strict

    theirs = hugging_face_config(config, 64, SpecialIds(None, None), torch.float32)
    original = AutoModelForCausalLM.from_config(theirs).state_dict()
    again = to_hugging_face(from_hugging_face(original, config), config)
    expected = {n: t for n, t in original.items() if n != "lm_head.weight" or not config.tied_embedding}
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_named_parameters_are_a_state_too(config, build):
    model = build(config)
    assert to_hugging_face(dict(model.named_parameters()), config).keys() == set(hugging_face_names(config).values())


def test_export_loads_in_transformers_and_here(config, build, batch, tmp_path):
    model = build(config)
    tokens, _ = batch(config, 2, 21)
    export_hugging_face(model, config, tmp_path / "out", sequence_length=48)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.model_type == model_type(config)
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        ours, exported = model(tokens), theirs(input_ids=tokens).logits
    assert (ours - exported).abs().max() <= LOGITS_OFF * ours.abs().max()

    stated = AutoConfig.from_pretrained(tmp_path / "out")
    assert stated.rope_parameters["rope_theta"] == config.rope_theta
    assert stated.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")
    assert (stated.max_position_embeddings, stated.rms_norm_eps) == (48, config.norm_eps)
    assert stated.tie_word_embeddings == config.tied_embedding
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == config.rope_theta

    read_config, state = open_hugging_face(tmp_path / "out")
    normalised = config.model_copy(update={"kv_heads": None if config.kv_heads == config.heads else config.kv_heads})
    assert read_config == normalised
    again = Llama(read_config)
    again.load_state_dict(state)
    assert torch.equal(again(tokens), model(tokens))


def test_a_model_saved_by_transformers_is_read(config, batch, tmp_path):
    theirs = AutoModelForCausalLM.from_config(hugging_face_config(config, 64, SpecialIds(1, 2), torch.float32))
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    read_config, state = open_hugging_face(tmp_path)
    model = Llama(read_config)
    model.load_state_dict(state)
    tokens, _ = batch(config)
    with torch.no_grad():
        ours, expected = model(tokens), theirs(input_ids=tokens).logits
    assert (ours - expected).abs().max() <= LOGITS_OFF * expected.abs().max()


def test_the_config_of_older_releases_is_read(tmp_path, build):
    config = CONFIGS["gqa-tied"]
    export_hugging_face(build(config), config, tmp_path / "out", sequence_length=16)
    path = tmp_path / "out/config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"]
    path.write_text(json.dumps(raw | {"rope_theta": 500_000.0, "rope_scaling": None}))
    assert open_hugging_face(tmp_path / "out")[0] == config


def test_shards_hold_each_tensor_once_and_windows_of_one_buffer_are_copied(tmp_path, build):
    """ZeRO keeps all parameters in one flat buffer."""
    state = to_hugging_face(build(CONFIGS["gqa-tied"]).state_dict(), CONFIGS["gqa-tied"])
    flat = torch.cat([t.flatten() for t in state.values()])
    parts = flat.split([t.numel() for t in state.values()])
    windows = {n: p.view(t.shape) for (n, t), p in zip(state.items(), parts, strict=True)}
    save_safetensors(windows, tmp_path, torch.float32, shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * flat.numel()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(f.stat().st_size < 34_000 for f in files)  # and its header
    found = {}
    for file in files:
        held = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in held)
        assert not found.keys() & held.keys()
        found |= held
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_generation_config_names_the_special_ids(build, tmp_path, monkeypatch):
    config = CONFIGS["mha-tied"]
    monkeypatch.setattr(hugging_face, "export_tokenizer", lambda *_: SpecialIds(1, 2))
    export_hugging_face(build(config), config, tmp_path / "out", sequence_length=16, tokenizer_folder=Path("any"))
    for stated in (GenerationConfig.from_pretrained(tmp_path / "out"), AutoConfig.from_pretrained(tmp_path / "out")):
        assert (stated.bos_token_id, stated.eos_token_id) == (1, 2)


def test_an_export_that_fails_leaves_nothing_that_looks_complete(build, tmp_path, monkeypatch):
    config = CONFIGS["mha-tied"]
    out = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()  # of a killed export
    (tmp_path / ".out.partial/model-00001-of-00009.safetensors").write_text("old")

    def full_disk(*_: object) -> None:
        assert not out.exists()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "save_safetensors", full_disk)
        with pytest.raises(OSError, match="No space"):
            export_hugging_face(build(config), config, out, sequence_length=16)
    assert not any(tmp_path.iterdir())
    export_hugging_face(build(config), config, out, sequence_length=16)
    assert {p.name for p in out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_an_existing_folder_is_not_overwritten(build, tmp_path):
    config = CONFIGS["mha-tied"]
    (tmp_path / "empty").mkdir()
    export_hugging_face(build(config), config, tmp_path / "empty", sequence_length=16)
    before = (tmp_path / "empty/config.json").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        export_hugging_face(build(config, seed=1), config, tmp_path / "empty", sequence_length=99)
    assert (tmp_path / "empty/config.json").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        export_hugging_face(build(config), config, tmp_path / "file", sequence_length=16)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("blocks.1.mlp.up.weight"), "blocks.1.mlp.up.weight is missing"),
        (lambda s: s.update({"norm.weight": torch.ones(31)}), r"norm.weight has the shape \[31\].*\[32\]"),
        (lambda s: s.update({"blocks.0.mlp.up.weight_scale": torch.ones(1)}), "weight_scale would be lost"),
        (lambda s: s.update({"head.weight": s["head.weight"] + 1}), "head.weight: differs from embed.weight"),
    ],
)
def test_states_that_do_not_fit_are_refused(build, tmp_path, change, told):
    state = dict(build(CONFIGS["mha-tied"]).state_dict())
    change(state)
    with pytest.raises(UserError, match=told):
        export_hugging_face(state, CONFIGS["mha-tied"], tmp_path / "out", sequence_length=16)
    assert not any(tmp_path.iterdir())


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma': only llama, mistral, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias = True: only False"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True: only False"),
        ({"model_type": "qwen2"}, r"layers\.0\.self_attn\.q_proj\.bias is missing"),
        ({"model_type": "qwen3"}, r"layers\.0\.self_attn\.[qk]_norm\.weight is missing"),
        ({"mlp_bias": True}, "mlp_bias = True: only False"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "names Python code"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ({"head_dim": 16}, r"q_proj.weight has the shape \[32, 32\].*\[64, 32\]"),
        ({"head_dim": 7}, "even rotary dimension, but got `head_dim`=7"),
        ({"rope_parameters": SCALED}, "rope_type = 'linear': only 'default' or 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = "),
        ({"hidden_size": "wide"}, "not a valid llama configuration"),
        ({"num_key_value_heads": 3}, "our kv_heads does not divide model.heads = 4"),
        ({"intermediate_size": 89}, r"gate_proj.weight has the shape \[88, 32\].*\[89, 32\]"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "would be lost"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_variants_that_would_compute_something_else_are_refused(build, tmp_path, change, told):
    config = CONFIGS["mha-tied"]
    export_hugging_face(build(config), config, tmp_path / "out", sequence_length=16)
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=told):
            open_hugging_face(tmp_path / "out")


def test_mistral_is_a_llama_within_its_window(batch, tmp_path):
    """Its attention mask is another one only beyond the window."""
    torch.manual_seed(0)
    theirs = MistralForCausalLM(
        MistralConfig(
            vocab_size=96, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=20, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    assert attention_window(tmp_path) == 20
    config, state = open_hugging_face(tmp_path)
    model = Llama(config)
    model.load_state_dict(state)
    for length, same in ((20, True), (24, False)):
        tokens, _ = batch(config, 2, length)
        with torch.no_grad():
            ours, expected = model(tokens), theirs(input_ids=tokens).logits
        off = (ours - expected).abs().max() / expected.abs().max()
        assert (off <= LOGITS_OFF) == same


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_table_stored_once_under_either_name_is_read(build, tmp_path, name):
    config = CONFIGS["mha-tied"]
    model = build(config)
    export_hugging_face(model, config, tmp_path / "out", sequence_length=16)
    held = load_file(tmp_path / "out/model.safetensors")
    held[name] = held.pop("model.embed_tokens.weight")
    save_file(held, tmp_path / "out/model.safetensors")
    read, state = open_hugging_face(tmp_path / "out")
    again = Llama(read)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_damaged_folders_are_refused(build, tmp_path):
    config = CONFIGS["mha-tied"]

    def exported(name: str) -> Path:
        export_hugging_face(build(config), config, tmp_path / name, sequence_length=16)
        return tmp_path / name

    with pytest.raises(UserError, match=r"holds no config\.json"):
        open_hugging_face(tmp_path / "nowhere")

    folder = exported("config")
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(UserError, match=r"config\.json.: cannot be read"):
        open_hugging_face(folder)

    folder = exported("layers")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 2**40}))
    with pytest.raises(UserError, match=r"num_hidden_layers is 1099511627776, and the folder holds \d+ tensors"):
        open_hugging_face(folder)

    for wrong in ({"num_attention_heads": 0}, {"rms_norm_eps": float("nan")}, {"hidden_size": -1}):
        (folder / "config.json").write_text(json.dumps(content | wrong))
        with pytest.raises(UserError, match=r"config.json: (is not a valid llama configuration|cannot be loaded)"):
            open_hugging_face(folder)

    folder = exported("truncated")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match="is damaged"):
        open_hugging_face(folder)

    folder = exported("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="can hold code"):
        open_hugging_face(folder)

    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(UserError, match="is missing"):
        open_hugging_face(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../truncated/model.safetensors"}}))
    with pytest.raises(UserError, match="not a safetensors file beside it"):
        open_hugging_face(folder)
    index.write_text("[]")
    with pytest.raises(UserError, match="is not an index"):
        open_hugging_face(folder)


def test_our_config_survives_theirs_for_every_field():
    """Each field of the shrunken configurations differs from LlamaConfig's default, so none can be forgotten."""
    config = CONFIGS["gqa-tied"].model_copy(update={"init_std": 0.05, "norm_eps": 3e-6})
    theirs = hugging_face_config(config, 128, SpecialIds(3, 4), torch.bfloat16).to_dict()
    expected = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 72, "tie_word_embeddings": True, "rms_norm_eps": 3e-6, "initializer_range": 0.05,
        "max_position_embeddings": 128, "bos_token_id": 3, "eos_token_id": 4, "attention_bias": False,
        "mlp_bias": False, "head_dim": 8, "hidden_act": "silu",
    }  # fmt: skip
    assert {key: theirs[key] for key in expected} == expected
    assert theirs["rope_parameters"]["rope_theta"] == 500_000.0
    default = LlamaConfig().to_dict()
    assert all(default[key] != expected[key] for key in list(expected)[:12])
