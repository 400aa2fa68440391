"""Evaluate one model in full precision, with its learned scales, or after post-training quantization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from qatscale.errors import UserError, did_you_mean
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.layers import Mode
from qatscale.quant.selection import fake_quant_modules

View = Literal["fp", "quantized", "ptq"]
_MODES: dict[View, Mode] = {"fp": "off", "quantized": "learned", "ptq": "dynamic"}


@contextmanager
def view(model: nn.Module, kind: View, bits: float | None = None) -> Iterator[None]:
    """A context in which a prepared `model` computes in another view. Its modes are restored on exit, also by an error.

    fp
        The weights as they are.
    quantized
        The weights with the learned scales. UserError before the switch, when the scales mean nothing yet.
    ptq
        The weights quantized to `bits` (None: the recipe's) by `ptq_scale`, without training. Each layer searches for
        its scales once per context, at its first forward. Embedding and head follow the recipe's rule for `bits`.
        Weights get no gradient.
    """
    if kind not in get_args(View):
        raise UserError("view", kind, f"one of {', '.join(get_args(View))}.", did_you_mean(kind, get_args(View)))
    if bits is not None and kind != "ptq":
        raise UserError("bits", bits, f"the view {kind!r} has its bits from training; only 'ptq' takes others.")
    layers = [module for _, module in fake_quant_modules(model)]
    if not layers:
        raise UserError(
            "model", type(model).__name__, "has no quantized layer.", "Call QatPlugin.prepare(model) first."
        )
    if kind == "quantized" and not all(layer.calibrated for layer in layers):
        raise UserError("view", kind, "the model has not switched to QAT; its scales mean nothing yet.", "Use 'ptq'.")

    before = [(layer, layer.mode, layer.dynamic_quantizer) for layer in layers]
    quantizers = [get_quantizer(layer.rule.at(layer.quantizer.bits if bits is None else bits)) for layer in layers]
    try:
        for layer, quantizer in zip(layers, quantizers, strict=True):
            layer.dynamic_quantizer = quantizer
            layer.mode = _MODES[kind]
        yield
    finally:
        for layer, mode, quantizer in before:
            layer.dynamic_quantizer = quantizer
            layer.mode = mode


@torch.no_grad()
def computed_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of a plain model, without scales, that computes what `model` computes in its present view."""
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(".weight_scale")}
    for name, layer in fake_quant_modules(model):
        if layer.mode != "off":
            state[f"{name}.weight"] = layer.effective_weight()
    return state
