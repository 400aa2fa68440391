"""The quantizers' arithmetic as plain tensor operations: what runs on CPU, and what the GPU kernels are held against.

It runs on any device, in fp32 or (for float64 inputs) float64, and torch.compile can trace and fuse it.

Shapes, here and in the modules below: a weight w is [..., in]. Its scale α is [...] (one per row) or [..., groups],
where each group is in/groups neighbouring input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatscale.quant.bit_widths import SCALE_FLOOR, Quantizer


def quantize(quantizer: Quantizer, w: Tensor, scale: Tensor) -> Tensor:
    """The quantized weight ŵ, in w's shape and dtype."""
    rows, scale = rows_of(w, scale)
    return decode_rows_(quantizer, encode_rows(quantizer, rows, scale), scale).to(w.dtype).reshape(w.shape)


def gradients(
    quantizer: Quantizer, grad: Tensor, w: Tensor, scale: Tensor, grad_factor: float
) -> tuple[Tensor, Tensor]:
    """(dL/dw, dL/dα) from grad = dL/dŵ, in the dtypes and shapes of w and α."""
    rows, floored = rows_of(w, scale)
    upstream = grad.reshape(rows.shape)
    v = rows / floored
    clipped = v.clamp(quantizer.low, quantizer.high)
    # 1. or 0.; boolean masks take ten times as long on CPUs.
    inside = clipped.clone().eq_(v)
    slope = _slope_(quantizer, rows, v, clipped, inside)
    grad_scale = slope.mul_(upstream).sum(-1).mul_(grad_factor).to(scale.dtype).reshape(scale.shape)
    return inside.mul_(upstream).to(w.dtype).reshape(w.shape), grad_scale


@torch.no_grad()
def encode(quantizer: Quantizer, w: Tensor, scale: Tensor) -> Tensor:
    """The integer code of every weight: int8, w's shape, from -qn to qp; binary has no code 0."""
    check_shapes(w, scale)
    return encode_rows(quantizer, *rows_of(w, scale)).to(torch.int8).reshape(w.shape)


def check_shapes(w: Tensor, scale: Tensor) -> None:
    """ValueError where `scale` has neither one number per row nor one per group of w."""
    per_row = scale.shape == w.shape[:-1]
    per_group = scale.dim() == w.dim() and scale.shape[:-1] == w.shape[:-1]
    if not per_row and not (per_group and scale.shape[-1] > 0 and w.shape[-1] % scale.shape[-1] == 0):
        raise ValueError(f"a scale of shape {list(scale.shape)} does not fit a weight of shape {list(w.shape)}")


def compute_dtype(w: Tensor, scale: Tensor) -> torch.dtype:
    """float64 where either is, else fp32."""
    return torch.promote_types(torch.promote_types(w.dtype, scale.dtype), torch.float32)


def rows_of(w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """w as [rows, channels that share a scale], still in its dtype, and max(α, floor) as [rows, 1] in `compute_dtype`.

    Where w is bf16, torch promotes it element by element inside the next operation, so that no fp32 copy is made.
    A weight that is not contiguous is copied.
    """
    shared = w.shape[-1] if scale.dim() < w.dim() else w.shape[-1] // scale.shape[-1]
    floored = scale.reshape(-1, 1).to(compute_dtype(w, scale)).clamp_min(SCALE_FLOOR)
    return w.reshape(scale.numel(), shared), floored


def encode_rows(quantizer: Quantizer, rows: Tensor, scale: Tensor) -> Tensor:
    """Codes as floating-point numbers, in a new tensor. rows: [n, k]; scale: [n, 1], floored."""
    if quantizer.name == "binary":
        return _sign_(rows.to(scale.dtype, copy=True))
    return _round_(quantizer, (rows / scale).clamp_(quantizer.low, quantizer.high))


def decode_rows_(quantizer: Quantizer, codes: Tensor, scale: Tensor) -> Tensor:
    """(code + shift)·(α/steps), in place. To the bit ((code + shift)/steps)·α, for steps 1, 2 or codes -1, 0, 1."""
    if quantizer.shift:
        codes.add_(quantizer.shift)
    return codes.mul_(scale if quantizer.steps == 1 else scale * (1 / quantizer.steps))


def _sign_(x: Tensor) -> Tensor:
    """+1 where x >= 0 (also -0.), else -1, in place."""
    return x.ge_(0).mul_(2).sub_(1)


def _round_(quantizer: Quantizer, clipped: Tensor) -> Tensor:
    """From v inside [low, high] to codes, in place. LSQ clips after rounding, which is the same for whole bounds."""
    if quantizer.steps != 1:
        clipped.mul_(quantizer.steps)
    if quantizer.shift:
        clipped.sub_(quantizer.shift)
    return clipped.round_()


def _slope_(quantizer: Quantizer, rows: Tensor, v: Tensor, clipped: Tensor, inside: Tensor) -> Tensor:
    """dŵ/dα of every weight: inside, q - v; outside, the outermost level. Overwrites `v` and `clipped`."""
    if quantizer.name == "binary":
        return _sign_(v.copy_(rows))
    slope = _round_(quantizer, clipped)
    if quantizer.shift:
        slope.add_(quantizer.shift)
    if quantizer.name == "ternary":
        # Outside, the released slope is ±1, the bare code c, and not the level ±2/3. Inside, c - (v + c/3) = q - v.
        return slope.sub_(v.add_(slope, alpha=1 - 1 / quantizer.steps).mul_(inside))
    if quantizer.steps != 1:
        slope.mul_(1 / quantizer.steps)
    return slope.sub_(v.mul_(inside))
