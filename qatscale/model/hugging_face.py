"""Weights and configuration to and from Hugging Face's Llama format (config.json + safetensors)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from qatscale.config.schema import ClashError, ModelConfig
from qatscale.errors import UserError
from qatscale.files import appearing, check_new
from qatscale.model.hugging_face_tokenizer import SpecialIds, export_tokenizer
from qatscale.model.llama import parameter_shapes
from qatscale.tensor_files import (
    SHARD_BYTES,
    LazyState,
    Shape,
    State,
    Types,
    renamed,
    shapes_of,
    type_of,
    write_safetensors,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READABLE_TYPES = ("F32", "BF16", "F16")

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
            _, layer, inner = name.removesuffix(".weight").split(".", 2)
            names[name] = f"model.layers.{layer}.{_IN_BLOCK[inner]}.weight"
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
    state = _without_tied_head(state, config, "lm_head.weight", "model.embed_tokens.weight")
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
        raise UserError("weights", None, _few(unknown) + " would be lost: a Llama has no such parameter.", fix)


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def hugging_face_config(config: ModelConfig, sequence_length: int, special: SpecialIds, dtype: torch.dtype) -> Any:
    """The `transformers.LlamaConfig` of this model, which was trained on sequences of `sequence_length` tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        hidden_act="silu",
        max_position_embeddings=sequence_length,
        initializer_range=config.init_std,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_embedding,
        bos_token_id=special.bos,
        eos_token_id=special.eos,
        dtype=str(dtype).removeprefix("torch."),
    )


def export_hugging_face(
    model: nn.Module | State,
    config: ModelConfig,
    folder: Path,
    *,
    sequence_length: int,
    tokenizer_folder: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM` loads, and AutoTokenizer where a tokenizer is given.

    dtype: of the written weights; None keeps theirs. Weights above 4 GB are split into shards. At most one tensor is
    held in memory beside the state, of a lazy state one in total. The folder appears complete or not at all. One
    process calls this, with full (not partitioned) weights. Raises UserError when `folder` is not empty or the weights
    do not fit the configuration.
    """
    check_new(folder)
    state = to_hugging_face(model.state_dict() if isinstance(model, nn.Module) else model, config)
    written_as = dtype or state["model.embed_tokens.weight"].dtype
    with appearing(folder) as partial:
        write_config(partial, config, sequence_length, tokenizer_folder, written_as)
        save_safetensors(state, partial, written_as)


def write_config(
    folder: Path,
    config: ModelConfig,
    sequence_length: int,
    tokenizer_folder: Path | None,
    dtype: torch.dtype,
    further: Mapping[str, Any] | None = None,
) -> None:
    """Write all files of a Hugging Face folder but its weights: config.json, generation_config.json, tokenizer.

    further: keys of config.json beyond `LlamaConfig`'s. `rope_theta` is also written where transformers before 5,
    mlx-lm and llama.cpp look for it; without it they assume 10,000.
    """
    from transformers import GenerationConfig

    special = export_tokenizer(tokenizer_folder, folder) if tokenizer_folder else SpecialIds(None, None)
    hugging_face_config(config, sequence_length, special, dtype).save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_bytes()) | {"rope_theta": config.rope_theta} | dict(further or {})
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
    """Configuration and state of a Llama saved by transformers; its tensors are read when they are accessed.

    Only safetensors are read: no code is executed. Raises UserError when it is another architecture, a variant that
    `Llama` cannot compute exactly (biases, scaled rotary positions, a sliding window, another activation or head size),
    or damaged.
    """
    config = read_config(Path(folder))
    return config, from_hugging_face(_open_safetensors(Path(folder)), config)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a folder saved by transformers. Raises UserError as `open_hugging_face` does."""
    return _model_config(_read_json(folder / "config.json"), str(folder / "config.json"))


def trained_length(folder: Path) -> int | None:
    """The positions that the model was trained on, from its configuration; None where that does not say."""
    return _read_json(folder / "config.json").get("max_position_embeddings")


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a config.json, which must be of model type llama."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError("model folder", str(path.parent), "holds no config.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(str(path), None, f"is not JSON: {error}.") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "llama":
        value = raw.get("model_type") if isinstance(raw, dict) else raw
        raise UserError("model_type", value, f"only 'llama' can be loaded ({path}).")
    return raw


def _model_config(raw: dict[str, Any], key: str) -> ModelConfig:
    """key: the file that an error names."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    try:
        theirs = LlamaConfig.from_dict(raw)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise UserError(key, None, f"is not a valid Llama configuration: {error}") from None

    heads = theirs.num_attention_heads
    for name, value, allowed in (
        ("attention_bias", theirs.attention_bias, False),
        ("mlp_bias", theirs.mlp_bias, False),
        ("attention_dropout", theirs.attention_dropout or 0, 0),
        ("hidden_act", theirs.hidden_act, "silu"),
        ("head_dim", theirs.head_dim, theirs.hidden_size // heads),
        ("rope_parameters.rope_type", theirs.rope_parameters.get("rope_type", "default"), "default"),
        ("rope_parameters.partial_rotary_factor", theirs.rope_parameters.get("partial_rotary_factor", 1), 1),
        ("sliding_window", raw.get("sliding_window"), None),
        ("quantization_config", raw.get("quantization_config"), None),
    ):
        if value != allowed:
            raise UserError(name, value, f"only {allowed!r} can be loaded ({key}).")
    try:
        return ModelConfig(
            vocab_size=theirs.vocab_size,
            hidden_size=theirs.hidden_size,
            layers=theirs.num_hidden_layers,
            heads=heads,
            kv_heads=None if theirs.num_key_value_heads == heads else theirs.num_key_value_heads,
            intermediate_size=theirs.intermediate_size,
            tied_embedding=theirs.tie_word_embeddings,
            rope_theta=theirs.rope_parameters["rope_theta"],
            norm_eps=theirs.rms_norm_eps,
            init_std=theirs.initializer_range,
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
            files = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(str(folder / INDEX), None, "is not an index of safetensors files.") from None
    shapes: dict[str, Shape] = {}
    holders: dict[str, Any] = {}
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise UserError(str(folder / INDEX), None, f"names {file!r}, which is not a safetensors file beside it.")
        try:
            opened = safe_open(folder / file, framework="pt")
        except FileNotFoundError:
            raise UserError("model folder", str(folder), f"{file} is missing; {INDEX} names it.") from None
        except SafetensorError as error:
            raise UserError(str(folder / file), None, f"is damaged: {error}.") from None
        for name in opened.keys():  # noqa: SIM118 - not a dict
            view = opened.get_slice(name)
            if view.get_dtype() not in READABLE_TYPES:
                problem = f"{name} is of type {view.get_dtype()}; only {', '.join(READABLE_TYPES)} can be loaded."
                raise UserError("weights", None, problem)
            shapes[name], holders[name] = tuple(view.get_shape()), opened
    return LazyState(shapes, lambda name: holders[name].get_tensor(name))
