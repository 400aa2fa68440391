"""A model that the plugin trained, as a Hugging Face folder: weights on their grid, and beside them what made it.

transformers loads the folder as it is. `qat.json` (settings, bits of each layer) and `qat_scales.safetensors` let
`qatscale export FOLDER` store the same codes and scales in the formats of other programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatscale.config.schema import QatConfig
from qatscale.files import write_json
from qatscale.new_folder import appearing, check_new
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.report import NothingQuantizedError
from qatscale.quant.selection import fake_quant_modules
from qatscale.tensor_files import not_finite, write_safetensors

SETTINGS, SCALES, WEIGHTS = "qat.json", "qat_scales.safetensors", "model.safetensors"


@torch.no_grad()
def write_model(
    model: nn.Module, qat: QatConfig, state: Mapping[str, Any], folder: Path, full: Callable[[nn.Parameter], Tensor],
    tokenizer: Any = None,
) -> None:  # fmt: skip
    """Write `folder`, which appears complete or not at all. One process writes; all call, where `full` is collective.

    state: the plugin's. full: a parameter's fp32 master. tokenizer: of transformers, saved too. The weights are held in
    memory at once, in the type of forward. NothingQuantizedError before the switch; FloatingPointError where a value is
    not finite; UserError where `folder` exists.
    """
    if state["switched_at"] is None:
        raise NothingQuantizedError("nothing to export: the model has not switched to QAT")
    is_writer = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if is_writer:
        check_new(folder)
    layers = {id(layer.weight): layer for _, layer in fake_quant_modules(model)}
    weights, scales = {}, {}
    for name, parameter in model.named_parameters():
        if name.endswith(".weight_scale"):
            continue
        weights[name] = full(parameter).to("cpu", parameter.dtype)
        if layer := layers.get(id(parameter)):
            scale = full(layer.weight_scale).to("cpu", layer.weight_scale.dtype)
            weights[name] = fake_quantize(layer.quantizer, weights[name], scale).detach()
            scales[f"{name}_scale"] = scale
    if not is_writer:
        return
    if wrong := not_finite([*weights.items(), *scales.items()]):
        raise FloatingPointError(f"{wrong} is not finite")
    with appearing(folder) as partial:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(partial, state_dict=weights)  # type: ignore[operator]
        else:
            shapes = {name: tuple(value.shape) for name, value in weights.items()}
            types = {name: value.dtype for name, value in weights.items()}
            write_safetensors(partial / WEIGHTS, shapes, types, weights.__getitem__)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        shapes = {name: tuple(value.shape) for name, value in scales.items()}
        write_safetensors(partial / SCALES, shapes, next(iter(scales.values())).dtype, scales.__getitem__)
        settings = {key: state[key] for key in ("switched_at", "group_size", "bits")}
        write_json(partial / SETTINGS, {"format": 1, "qat": qat.model_dump(mode="json"), **settings})
