"""The quantizers' arithmetic as plain tensor operations: what the fast implementations are held against.

It runs on any device, in fp32 or (for float64 inputs) float64, and torch.compile can trace and fuse it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qatscale.quant.quantizers import Quantizer

ALPHA_FLOOR = 1e-5
"""The forward and backward pass use max(α, ALPHA_FLOOR), as released. The gradient still reaches an α below it."""


def quantize(quantizer: Quantizer, w: Tensor, alpha: Tensor) -> Tensor:
    """The quantized weight, in w's shape and dtype."""
    x, a = rows_of(w, alpha)
    return decode_(quantizer, encode(quantizer, x, a), a).to(w.dtype).reshape(w.shape)


def gradients(
    quantizer: Quantizer, grad: Tensor, w: Tensor, alpha: Tensor, grad_factor: float
) -> tuple[Tensor, Tensor]:
    """(dL/dw, dL/dα) from dL/dŵ, in the dtypes and shapes of w and α."""
    x, a = rows_of(w, alpha)
    upstream = grad.reshape(x.shape)
    v = x / a
    clipped = v.clamp(quantizer.low, quantizer.high)
    # 1. or 0.; boolean masks take ten times as long on CPUs.
    inside = clipped.clone().eq_(v)
    slope = _slope_(quantizer, x, v, clipped, inside)
    grad_alpha = slope.mul_(upstream).sum(-1).mul_(grad_factor).to(alpha.dtype).reshape(alpha.shape)
    return inside.mul_(upstream).to(w.dtype).reshape(w.shape), grad_alpha


def rows_of(w: Tensor, alpha: Tensor, compute: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """w as [rows, channels that share a scale], still in its dtype, and the floored α as [rows, 1] in fp32 or float64.

    fp32 α against bf16 w: torch promotes element by element inside the next operation, so that no fp32 copy is made.
    A weight that is not contiguous is copied.
    """
    if compute is None:
        compute = compute_dtype(w, alpha)
    shared = w.shape[-1] if alpha.dim() < w.dim() else w.shape[-1] // alpha.shape[-1]
    return w.reshape(alpha.numel(), shared), alpha.reshape(-1, 1).to(compute).clamp_min(ALPHA_FLOOR)


def compute_dtype(w: Tensor, alpha: Tensor) -> torch.dtype:
    """float64 where either is, else fp32."""
    return torch.promote_types(torch.promote_types(w.dtype, alpha.dtype), torch.float32)


def encode(quantizer: Quantizer, x: Tensor, a: Tensor) -> Tensor:
    """Codes as floating-point numbers, in a tensor of their own. x: [rows, k], a: [rows, 1]."""
    if quantizer.name == "binary":
        return _sign_(x.to(a.dtype, copy=True))
    return _round_(quantizer, (x / a).clamp_(quantizer.low, quantizer.high))


def decode_(quantizer: Quantizer, codes: Tensor, a: Tensor) -> Tensor:
    """(code + shift)·(α/steps), in place: to the bit ((code + shift)/steps)·α, for steps 1, 2 or codes -1, 0, 1."""
    if quantizer.shift:
        codes.add_(quantizer.shift)
    return codes.mul_(a if quantizer.steps == 1 else a * (1 / quantizer.steps))


def _sign_(x: Tensor) -> Tensor:
    """+1 where x >= 0 (also -0.), else -1, in place."""
    return x.ge_(0).mul_(2).sub_(1)


def _round_(quantizer: Quantizer, clipped: Tensor) -> Tensor:
    """From v inside [low, high] to codes, in place. LSQ clips after rounding: the same, as its bounds are whole."""
    if quantizer.steps != 1:
        clipped.mul_(quantizer.steps)
    if quantizer.shift:
        clipped.sub_(quantizer.shift)
    return clipped.round_()


def _slope_(quantizer: Quantizer, x: Tensor, v: Tensor, clipped: Tensor, inside: Tensor) -> Tensor:
    """dŵ/dα of every weight: inside, q - v; outside, the outermost level. Overwrites `v` and `clipped`."""
    if quantizer.name == "binary":
        return _sign_(v.copy_(x))
    slope = _round_(quantizer, clipped)
    if quantizer.shift:
        slope.add_(quantizer.shift)
    if quantizer.name == "ternary":
        # Outside, the released slope is ±1, the bare code c, and not the level ±2/3. Inside, c - (v + c/3) = q - v.
        return slope.sub_(v.add_(slope, alpha=1 - 1 / quantizer.steps).mul_(inside))
    if quantizer.steps != 1:
        slope.mul_(1 / quantizer.steps)
    return slope.sub_(v.mul_(inside))
