"""What the tests know of each format by themselves: closed forms of sizes, bounds, and its client without our code.

The tests run over the product's list of formats: one without an entry here fails them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BFLOAT, HALF = 2.0**-8, 2.0**-11
"""Relative rounding of bf16 and fp16."""


class LoadedInTransformers:
    """An export in transformers; its weights are as they were loaded."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, **options)
        self.model(torch.tensor([[0]]))  # unpacks what is packed
        self.weights = {
            n: p.detach().clone() for n, p in self.model.named_parameters() if n.endswith((".weight", ".bias"))
        }
        torch.nn.Module.float(self.model)

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(tokens).logits


class LoadedInMlx:
    def __init__(self, folder: Path) -> None:
        import mlx.core as mx
        import numpy as np
        from mlx_lm import load

        self.model, _ = load(str(folder))
        self.weights = {}
        for name, module in self.model.named_modules():
            if "scales" in module:
                weight = mx.dequantize(
                    module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits
                )
                self.weights[f"{name}.weight"] = torch.from_numpy(np.array(weight))
            elif "weight" in module:
                self.weights[f"{name}.weight"] = torch.from_numpy(np.array(module.weight.astype(mx.float32)))
            if "bias" in module:
                self.weights[f"{name}.bias"] = torch.from_numpy(np.array(module.bias.astype(mx.float32)))

    def logits(self, tokens: Tensor) -> Tensor:
        import mlx.core as mx
        import numpy as np

        return torch.from_numpy(np.array(self.model(mx.array(tokens.numpy())).astype(mx.float32)))


Loaded = LoadedInTransformers | LoadedInMlx


def nothing(weight: Tensor, bf16: bool) -> float | Tensor:  # noqa: ARG001
    return 0.0


def fp16_scales(weight: Tensor, bf16: bool) -> float | Tensor:
    """A subnormal scale loses more than HALF: 2^-25 of the level it is multiplied with, at most 7. In bf16 scales lose
    nothing, and the values are those that training rounded to bf16."""
    return BFLOAT * weight.abs() if bf16 else HALF * weight.abs() + 7 * 2.0**-25


def affine(weight: Tensor, bf16: bool) -> float | Tensor:
    """s·q + b is rounded twice at the size of the largest level."""
    return (2.0**-20 + (BFLOAT if bf16 else 0.0)) * weight.abs().max()


@dataclass(frozen=True)
class Expected:
    load: Callable[[Path], Loaded]
    files: Mapping[str, Any]
    """Name -> content of files by which a folder is recognised."""
    bits: Mapping[str, float | None]
    """Run -> bits of a weight in a block's matrix, a scale of its own apart; None = plain numbers."""
    table_bits: Mapping[str, float] = field(default_factory=dict)
    """Run -> bits of a weight of the embedding, where it is not stored as plain numbers."""
    weights_off: Callable[[Tensor, bool], float | Tensor] = nothing
    """(weight, run in bf16) -> largest difference of a loaded weight from the trained forward pass's."""
    logits_off: Mapping[str, float] = field(default_factory=dict)
    """Run -> bound on logits relative to the largest, where it is not 1e-5: sums in another order."""
    own_logits_off: Mapping[str, float] = field(default_factory=dict)
    """The same against our model with the loaded weights."""
    fp32_norms: bool = False
    beside: Callable[[int, int, int], float] = lambda rows, matrices, wide: 0  # noqa: ARG005
    """(rows of all matrices in blocks, these matrices, bytes of training's type) -> bytes stored beside the codes."""
    snippets: int = 1
    generates: bool = True
    """Whether `qatscale generate` runs it; else it refuses."""


PLAIN = dict.fromkeys(("one", "two", "four", "six"))
BF16_RUNS = ("two", "six")
EXPECTED: dict[str, Expected] = {
    "hf": Expected(LoadedInTransformers, {"config.json": {}}, PLAIN),
    "compressed-tensors": Expected(
        LoadedInTransformers,
        {"config.json": {"quantization_config": {"quant_method": "compressed-tensors"}}},
        {"one": 2, "two": 3, "four": 4, "six": 6},  # ±1 takes two bits, ±1 and ±3 take three
        beside=lambda rows, matrices, wide: rows * wide + matrices * 16,  # scales, and shapes of two int64
    ),
    "gguf": Expected(
        lambda folder: LoadedInTransformers(folder, gguf_file=next(folder.glob("*.gguf")).name),
        {"config.json": {}, "model.gguf": {}},
        {"one": 66 / 32, "two": 84 / 32, "four": 18 / 4, "six": 210 / 32},  # bytes of a block over its weights
        {"one": 4.5, "two": 4.5, "six": 210 / 32},
        weights_off=fp16_scales,
        logits_off=dict.fromkeys(PLAIN, 2e-2),
        fp32_norms=True,
        snippets=2,
    ),
    "mlx": Expected(
        LoadedInMlx,
        {"config.json": {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}},
        {"one": 1 + 64 / 128, "two": 2 + 64 / 128, "four": 4 + 64 / 128, "six": 6 + 64 / 128},
        {"one": 4.5, "two": 4.5, "six": 6.5},
        weights_off=affine,
        logits_off=dict.fromkeys(BF16_RUNS, 2e-2),
        own_logits_off=dict.fromkeys(BF16_RUNS, 2e-2),  # MLX computes in the type of its scales
        fp32_norms=True,
    ),
}
