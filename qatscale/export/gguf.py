"""`gguf`: one file for llama.cpp, which transformers reads too, with its tokenizer.

Names and metadata are those of llama.cpp's `llama` architecture. It turns neighbouring pairs of channels where
Hugging Face (and we) turn channel i with i + d/2, so the rows of q and k, and their scales, are permuted within each
head. Norms are fp32. What is not quantized is stored in training's type.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatscale.config.schema import ModelConfig
from qatscale.export import gguf_blocks as blocks
from qatscale.export.encoding import Encoding, Entry, Plain, Plan, choose
from qatscale.export.gguf_blocks import BlockType, to_blocks
from qatscale.export.gguf_file import BF16, F32, TensorInfo, write_gguf
from qatscale.export.gguf_vocabulary import vocabulary
from qatscale.export.source import Parameter, Source
from qatscale.model.hugging_face_tokenizer import export_tokenizer

NAME = "gguf"
FILE = "model.gguf"

CHOICES: dict[str, tuple[BlockType, ...]] = {
    "1": (blocks.TQ2_0, blocks.Q4_0),
    "1.58": (blocks.TQ2_0, blocks.Q4_0),
    "2": (blocks.Q2_K, blocks.Q4_0),
    "3": (blocks.Q3_K, blocks.Q4_0),
    "4": (blocks.Q4_0,),
    "5": (blocks.Q5_0,),
    "6": (blocks.Q6_K, blocks.Q8_0),
    "8": (blocks.Q8_0,),
}
"""Bits -> types that hold the integers, best first. Those of 32 weights take rows that those of 256 do not."""

_OUTER = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
_IN_BLOCK = {
    "attention_norm": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.o": "attn_output", "mlp_norm": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}  # fmt: skip
_PLAIN = {torch.float32: F32, torch.bfloat16: BF16}
_FILE_TYPES = {torch.float32: 0, torch.bfloat16: 32}


@dataclass(frozen=True)
class Block(Encoding):
    kind: BlockType

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.kind.name

    def refusal(self, parameter: Parameter) -> str | None:
        for what, width in (("rows", parameter.shape[1]), ("groups of scales", parameter.group)):
            if width % self.kind.width:
                return f"{self.kind.name} has blocks of {self.kind.width} weights, and {what} are {width} wide."
        return None

    def size(self, parameter: Parameter) -> int:
        return -(-parameter.numel // self.kind.width) * self.kind.size

    def store_unit(self, unit: Tensor) -> Tensor:
        return unit.half().float()


def gguf_name(parameter: Parameter) -> str:
    if parameter.name in _OUTER:
        return _OUTER[parameter.name]
    _, layer, inner = parameter.name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{_IN_BLOCK[inner]}.weight"


def plan(source: Source, fallback: bool, q1_0: bool = False) -> Plan:
    """q1_0: matrices of 1 bit in Q1_0, half the size of TQ2_0, which llama.cpp reads and transformers does not."""
    plain = Plain(source.dtype)
    choices: dict[str, list[Encoding]] = {}
    for p in source.parameters:
        if p.quantizer:
            kinds = CHOICES[p.quantizer.bits_text]
            kinds = (blocks.Q1_0, *kinds) if q1_0 and p.quantizer.bits == 1 else kinds
            choices[p.name] = [*map(Block, kinds), plain]
        else:
            choices[p.name] = [Plain(torch.float32) if p.is_norm else plain]
    return choose(source, NAME, choices, fallback)


def has_q1_0(plan: Plan) -> bool:
    return any(isinstance(entry.encoding, Block) and entry.encoding.kind is blocks.Q1_0 for entry in plan.entries)


def write(plan: Plan, folder: Path, tokenizer: Path | None) -> None:
    config = plan.source.config
    if tokenizer:
        export_tokenizer(tokenizer, folder)
    metadata = _metadata(plan) | vocabulary(folder if tokenizer else None, config.model.vocab_size)
    write_gguf(folder / FILE, metadata, [_tensor(plan, entry) for entry in plan.entries])


def _metadata(plan: Plan) -> dict[str, Any]:
    config, model = plan.source.config, plan.source.config.model
    heads = model.heads
    return {
        "general.architecture": "llama",
        "general.name": config.name,
        "general.file_type": _file_type(plan),
        "general.quantization_version": 2,
        "llama.vocab_size": model.vocab_size,
        "llama.context_length": config.data.sequence_length,
        "llama.embedding_length": model.hidden_size,
        "llama.block_count": model.layers,
        "llama.feed_forward_length": model.intermediate_size,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": model.kv_heads or heads,
        "llama.attention.layer_norm_rms_epsilon": float(model.norm_eps),
        "llama.rope.dimension_count": model.hidden_size // heads,
        "llama.rope.freq_base": float(model.rope_theta),
    }


def _file_type(plan: Plan) -> int:
    """llama.cpp shows it as the file's type: that of most weights."""
    weights: Counter[int] = Counter()
    for entry in plan.entries:
        if isinstance(entry.encoding, Block):
            weights[entry.encoding.kind.file_type] += entry.parameter.numel
        else:
            assert isinstance(entry.encoding, Plain)
            weights[_FILE_TYPES[entry.encoding.dtype]] += entry.parameter.numel
    return weights.most_common(1)[0][0]


def _tensor(plan: Plan, entry: Entry) -> TensorInfo:
    parameter, encoding = entry.parameter, entry.encoding
    rows = permutation(parameter, plan.source.config.model)

    def coded() -> np.ndarray:
        assert isinstance(encoding, Block)
        grid = plan.grid(entry)
        grid = grid if rows is None else grid.taking(rows)
        return to_blocks(encoding.kind, grid.integers.numpy(), grid.unit.half().numpy())

    def values() -> np.ndarray:
        value = plan.stored(entry)
        value = value if rows is None else value[rows]
        return value.contiguous().view(torch.uint8).numpy()

    if isinstance(encoding, Block):
        kind, make = encoding.kind.number, coded
    else:
        assert isinstance(encoding, Plain)
        kind, make = _PLAIN[encoding.dtype], values
    return TensorInfo(gguf_name(parameter), parameter.shape, kind, encoding.size(parameter), make)


def permutation(parameter: Parameter, config: ModelConfig) -> Tensor | None:
    """For the rows of q and k: the index in our order of each row in llama.cpp's; None for everything else.

    Within a head of d channels, 0, d/2, 1, d/2 + 1, ...: what turns together stands together.
    """
    if not parameter.name.endswith(("attention.q.weight", "attention.k.weight")):
        return None
    channels = config.hidden_size // config.heads
    rows = torch.arange(parameter.shape[0])
    return rows.view(-1, 2, channels // 2).transpose(1, 2).flatten()
