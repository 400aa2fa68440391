"""Weights and configuration to and from Hugging Face: Llama, Mistral, Qwen2 and Qwen3 (config.json + safetensors).

Our Llama computes all four: Qwen2 is a Llama with biases of q, k and v, Qwen3 one with normed q and k, Mistral one
whose attention may look back over a window only. Models are written as the first of Llama, Qwen2, Qwen3 that fits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from qatlaw.text import listed
from qatscale.config.schema import ClashError, ModelConfig
from qatscale.errors import UserError
from qatscale.model.hugging_face_tokenizer import SpecialIds, export_tokenizer
from qatscale.model.lazy_state import LazyState, State, renamed, shapes_of
from qatscale.model.llama import parameter_shapes
from qatscale.new_folder import appearing, check_new
from qatscale.tensor_files import SHARD_BYTES, Shape, Types, type_of, write_safetensors
from qatscale.untrusted import check_json_files, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READABLE_TYPES = ("F32", "BF16", "F16")
TYPES = ("llama", "mistral", "qwen2", "qwen3")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Our `rope_scaling` in Hugging Face's names."""

_FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "intermediate_size": "intermediate_size", "tied_embedding": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps", "init_std": "initializer_range",
}  # fmt: skip
"""Keys of ours that Hugging Face's configuration has under other names, with the same values."""

_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def hugging_face_names(config: ModelConfig) -> dict[str, str]:
    """Our name → Hugging Face's name of every parameter; a tied head has no name of its own in either."""
    names = {}
    for name in parameter_shapes(config):
        if name in _OUTER:
            names[name] = _OUTER[name]
        else:
            module, _, kind = name.rpartition(".")
            _, layer, inner = module.split(".", 2)
            names[name] = f"model.layers.{layer}.{_IN_BLOCK[inner]}.{kind}"
    return names


def to_hugging_face(state: State, config: ModelConfig) -> State:
    """The state of a `Llama` under Hugging Face's names, with the same tensors, lazy where `state` is lazy.

    Raises UserError when a parameter is missing, unknown or of another shape, or a tied head is not the embedding.
    """
    state = _without_tied_head(state, config, "head.weight", "embed.weight")
    _check(state, parameter_shapes(config))
    return renamed(state, {theirs: ours for ours, theirs in hugging_face_names(config).items()})


def from_hugging_face(state: State, config: ModelConfig) -> State:
    """The inverse: a state that `Llama(config).load_state_dict` takes. A tied head is the embedding's tensor.

    Raises UserError as `to_hugging_face` does. Buffers of rotary frequencies in old checkpoints are ignored.
    """
    state = renamed(state, {name: name for name in state if not name.endswith(".rotary_emb.inv_freq")})
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if config.tied_embedding and head in state and embed not in state:  # stored once, under the other name
        state = renamed(state, {embed if name == head else name: name for name in state})
    state = _without_tied_head(state, config, head, embed)
    names = hugging_face_names(config)
    _check(state, {names[ours]: shape for ours, shape in parameter_shapes(config).items()})
    return renamed(state, names | ({"head.weight": names["embed.weight"]} if config.tied_embedding else {}))


def _without_tied_head(state: State, config: ModelConfig, head: str, embed: str) -> State:
    if not config.tied_embedding or head not in state:
        return state
    if embed in state:
        one, other = state[head], state[embed]
        if one is not other and not torch.equal(one, other):
            raise UserError(head, None, f"differs from {embed}, but the configuration ties the two.")
    return renamed(state, {name: name for name in state if name != head})


def _check(state: State, shapes: Mapping[str, tuple[int, ...]]) -> None:
    state_shapes = shapes_of(state)
    for name, shape in shapes.items():
        if name not in state_shapes:
            raise UserError("weights", None, f"{name} is missing.")
        if state_shapes[name] != shape:
            problem = f"{name} has the shape {list(state_shapes[name])}; the configuration requires {list(shape)}."
            raise UserError("weights", None, problem)
    if unknown := sorted(set(state_shapes) - set(shapes)):
        fix = "Quantizer scales have no place in this format: fold them into the weights, or leave them out."
        raise UserError("weights", None, f"{listed(unknown)} would be lost: a Llama has no such parameter.", fix)


def model_type(config: ModelConfig) -> str:
    """The type that Hugging Face calls this model: llama, qwen2 or qwen3."""
    return "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"


def hugging_face_config(config: ModelConfig, sequence_length: int, special: SpecialIds, dtype: torch.dtype) -> Any:
    """The configuration of transformers for this model, which was trained on sequences of `sequence_length` tokens."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type(config)]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "llama3", **dict(zip(_LLAMA3, config.rope_scaling, strict=True))}
        rope["original_max_position_embeddings"] = round(rope["original_max_position_embeddings"])
    return kind(
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        architectures=[f"{kind.__name__.removesuffix('Config')}ForCausalLM"],
        num_key_value_heads=config.kv_heads or config.heads, head_dim=config.channels, hidden_act="silu",
        max_position_embeddings=sequence_length, rope_parameters=rope, bos_token_id=special.bos,
        eos_token_id=special.eos, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def export_hugging_face(
    model: nn.Module | State,
    config: ModelConfig,
    folder: Path,
    *,
    sequence_length: int,
    tokenizer_folder: Path | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM` loads, and AutoTokenizer where a tokenizer is given.

    Weights above 4 GB are split into shards. At most one tensor is held in memory beside the state, of a lazy state one
    in total. The folder appears complete or not at all. One process calls this, with full (not partitioned) weights.
    Raises UserError when `folder` is not empty or the weights do not fit the configuration.
    """
    check_new(folder)
    state = to_hugging_face(model.state_dict() if isinstance(model, nn.Module) else model, config)
    dtype = state["model.embed_tokens.weight"].dtype
    with appearing(folder) as partial:
        write_config(partial, config, sequence_length, tokenizer_folder, dtype)
        save_safetensors(state, partial, dtype)


def write_config(
    folder: Path,
    config: ModelConfig,
    sequence_length: int,
    tokenizer_folder: Path | None,
    dtype: torch.dtype,
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write all files of a Hugging Face folder but its weights: config.json, generation_config.json, tokenizer.

    further: keys of config.json beyond the model's. `rope_theta` and the scaling are also written where transformers
    before 5, mlx-lm and llama.cpp look for them; without it they assume 10,000 and no scaling.
    """
    from transformers import GenerationConfig

    special = export_tokenizer(tokenizer_folder, folder) if tokenizer_folder else SpecialIds(None, None)
    hugging_face_config(config, sequence_length, special, dtype).save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_bytes())
    if config.rope_scaling:
        content["rope_scaling"] = {k: v for k, v in content["rope_parameters"].items() if k != "rope_theta"}
    content |= {"rope_theta": config.rope_theta} | dict(further or {})
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    GenerationConfig(bos_token_id=special.bos, eos_token_id=special.eos).save_pretrained(folder)


def save_safetensors(state: State, folder: Path, types: Types, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `state` as model.safetensors, or as shards with an index where it is larger than `shard_bytes`."""
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = shapes_of(state)
    sizes = {name: torch.empty(s, dtype=type_of(name, types), device="meta") for name, s in shapes.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        write_safetensors(folder / file, {name: shapes[name] for name in names}, types, state.__getitem__)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def open_hugging_face(folder: Path) -> tuple[ModelConfig, State]:
    """Configuration and state of a model saved by transformers; its tensors are read when they are accessed.

    Only safetensors are read: no code is executed. Raises UserError, naming the key, for another architecture and for a
    variant that `Llama` cannot compute exactly (other biases, other scaled rotary positions, another activation), and
    for a damaged folder. A sliding window is the caller's to compare with its sequences: `attention_window`.
    """
    config, state = read_config(folder), _open_safetensors(folder)
    if state and config.layers > len(state):  # before anything loops over them
        problem = f"num_hidden_layers is {config.layers}, and the folder holds {len(state)} tensors."
        raise UserError("model folder", str(folder / "config.json"), problem)
    return config, from_hugging_face(state, config)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a folder saved by transformers. Raises UserError as `open_hugging_face` does."""
    raw = _read_json(folder / "config.json")
    check_json_files(folder, "model folder", "AutoModel")
    return _model_config(raw, str(folder / "config.json"))


def trained_length(folder: Path) -> int | None:
    """The positions that the model was trained on, from its configuration; None where that does not say."""
    return _read_json(folder / "config.json").get("max_position_embeddings")


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a config.json, which must be of a model type that can be loaded."""
    if not path.is_file():
        raise UserError("model folder", str(path.parent), "holds no config.json.")
    raw = read_json(path, "model folder")
    value = raw.get("model_type") if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or value not in TYPES:
        raise UserError("model_type", value, f"only {', '.join(TYPES)} can be loaded ({path}).")
    return raw


def _transformers_config(raw: dict[str, Any], key: str) -> Any:
    """key: the file that an error names."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (StrictDataclassError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise UserError(key, None, f"is not a valid {raw['model_type']} configuration: {error}") from None


def attention_window(folder: Path) -> int | None:
    """The positions that attention looks back over, where a model of this folder limits them; else None."""
    path = folder / "config.json"
    raw = _read_json(path)
    return None if raw["model_type"] == "llama" else _transformers_config(raw, str(path)).sliding_window


def _model_config(raw: dict[str, Any], key: str) -> ModelConfig:
    """key: the file that an error names."""
    theirs = _transformers_config(raw, key)
    kind, heads, rope = theirs.model_type, theirs.num_attention_heads, theirs.rope_parameters
    for name, value, allowed in (
        ("attention_bias", getattr(theirs, "attention_bias", False) or False, (False,)),
        ("mlp_bias", getattr(theirs, "mlp_bias", False) or False, (False,)),
        ("attention_dropout", theirs.attention_dropout or 0, (0,)),
        ("hidden_act", theirs.hidden_act, ("silu",)),
        ("rope_parameters.rope_type", rope.get("rope_type", "default"), ("default", "llama3")),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1), (1,)),
        ("quantization_config", raw.get("quantization_config"), (None,)),
    ):
        if value not in allowed:
            raise UserError(name, value, f"only {' or '.join(map(repr, allowed))} can be loaded ({key}).")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    scaling = None
    if rope.get("rope_type") == "llama3":
        missing = [name for name in _LLAMA3 if rope.get(name) is None]
        if missing:
            raise UserError(
                f"rope_parameters.{missing[0]}", None, f"is missing, and rope_type llama3 needs it ({key})."
            )
        scaling = tuple(rope[name] for name in _LLAMA3)
    try:
        return ModelConfig(
            **{ours: getattr(theirs, name) for ours, name in _FIELDS.items()},
            kv_heads=None if theirs.num_key_value_heads == heads else theirs.num_key_value_heads,
            head_dim=None if head_dim * heads == theirs.hidden_size else head_dim,
            attention_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            rope_theta=rope["rope_theta"],
            rope_scaling=scaling,
        )
    except ValidationError as error:
        first = error.errors()[0]
        clash = first.get("ctx", {}).get("error")
        ours = clash.key if isinstance(clash, ClashError) else ".".join(map(str, first["loc"]))
        problem = f"cannot be loaded as a Llama: our {ours} {first['msg'].removeprefix('Value error, ')}."
        raise UserError(key, None, problem) from None


def _open_safetensors(folder: Path) -> LazyState:
    """The weights of a folder, in one file or in shards with an index."""
    from safetensors import SafetensorError, safe_open

    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if not (folder / INDEX).is_file():
            problem = f"holds neither {WEIGHTS} nor {INDEX}; other formats can hold code and are not read."
            fix = "Load it with transformers where you trust it, and save it again: model.save_pretrained(FOLDER)."
            raise UserError("model folder", str(folder), problem, fix)
        try:
            files = sorted(set(read_json(folder / INDEX, "model folder")["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise UserError(str(folder / INDEX), None, "is not an index of safetensors files.") from None
    shapes: dict[str, Shape] = {}
    holders: dict[str, Any] = {}
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(file)):
            raise UserError(str(folder / INDEX), None, f"names {file!r}, which is not a safetensors file beside it.")
        try:
            opened = safe_open(folder / file, framework="pt")
        except FileNotFoundError:
            raise UserError("model folder", str(folder), f"{file} is missing; {INDEX} names it.") from None
        except (SafetensorError, OSError) as error:
            raise UserError(str(folder / file), None, f"is damaged: {error}.") from None
        for name in opened.keys():  # noqa: SIM118 - not a dict
            view = opened.get_slice(name)
            if view.get_dtype() not in READABLE_TYPES:
                problem = f"{name} is of type {view.get_dtype()}; only {', '.join(READABLE_TYPES)} can be loaded."
                raise UserError("weights", None, problem)
            shapes[name], holders[name] = tuple(view.get_shape()), opened
    return LazyState(shapes, lambda name: holders[name].get_tensor(name))
