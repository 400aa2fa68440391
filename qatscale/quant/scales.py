"""The scale α of a weight before it trains: at the switch, and for post-training quantization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qatscale.quant.bit_widths import SCALE_FLOOR, Quantizer
from qatscale.quant.reference import decode_rows_, encode_rows, rows_of

PTQ_COARSE = 40
PTQ_FINE = 20
PTQ_RANGE = (0.05, 1.6)
"""`ptq_scale` tries α within these multiples of the initial α: above 1 for SEQ, whose outermost level is below α."""
_PTQ_CHUNK = 1 << 22
"""Weights that `ptq_scale` works on at a time, so that its buffers do not grow with the matrix."""


@torch.no_grad()
def initial_scale(
    quantizer: Quantizer, w: Tensor, group_size: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """α at the switch: mean|w| at 1 bit, max|w|/Qp above; never below SCALE_FLOOR.

    w: [..., in] -> α: [...] or [..., in/group_size], in w's dtype or `dtype` (at least fp32). dtype: the type in which
    the forward pass holds w and α; None: that of the result.

    α is rounded up where forward would otherwise see the row's largest weight above Qp, in `dtype`. Whether a weight
    on the edge is clipped decides its gradient and most of its scale's gradient, so it must not depend on a last bit.
    """
    size = w.abs().to(torch.promote_types(torch.promote_types(w.dtype, dtype or w.dtype), torch.float32))
    if group_size is not None:
        size = size.unflatten(-1, (-1, group_size))
    if quantizer.name == "binary":
        return size.mean(-1).clamp_min(SCALE_FLOOR)
    dtype = dtype or size.dtype
    largest = size.amax(-1).to(dtype).to(size.dtype)
    scale = (largest / quantizer.qp).to(dtype)
    outside = largest / scale.to(size.dtype) > quantizer.qp
    scale = torch.where(outside, scale.nextafter(torch.full_like(scale, math.inf)), scale)
    return scale.to(size.dtype).clamp_min(SCALE_FLOOR)


@torch.no_grad()
def ptq_scale(quantizer: Quantizer, w: Tensor, group_size: int | None = None) -> Tensor:
    """Post-training quantization: the α per row or group with the least squared error of the quantized weights.

    A grid search in two passes: PTQ_COARSE multiples of the initial α, evenly spaced in the logarithm over PTQ_RANGE,
    then PTQ_FINE between the neighbours of the best. The initial α is among the candidates, so the result is never
    worse. On rows of 128 Gaussian weights, the mean error is within 0.5 % of the best of 1500 scales up to 6 bits. At 8
    bits it is within 3 %. At 1 bit the initial α, mean|w|, is the exact optimum. Shapes are those of `initial_scale`.
    """
    scale = initial_scale(quantizer, w, group_size)
    if quantizer.name == "binary" or scale.numel() == 0:
        return scale
    rows = w.reshape(scale.numel(), -1)
    chunk = max(1, _PTQ_CHUNK // rows.shape[1])
    parts = zip(rows.split(chunk), scale.reshape(-1).split(chunk), strict=True)
    return torch.cat([_search(quantizer, *part) for part in parts]).reshape(scale.shape)


def _search(quantizer: Quantizer, rows: Tensor, initial: Tensor) -> Tensor:
    """rows: [n, k], initial: [n] -> the best α of every row, [n]."""
    rows = rows.to(initial.dtype)
    best, least = initial, _squared_error(quantizer, rows, initial)
    low, high = (math.log(bound) for bound in PTQ_RANGE)
    spacing = (high - low) / (PTQ_COARSE - 1)

    def improve(scale: Tensor) -> None:
        nonlocal best, least
        error = _squared_error(quantizer, rows, scale)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)

    for index in range(PTQ_COARSE):
        improve(initial * math.exp(low + spacing * index))
    centre = best
    for index in range(PTQ_FINE):
        improve(centre * math.exp(spacing * (2 * (index + 0.5) / PTQ_FINE - 1)))
    return best


def _squared_error(quantizer: Quantizer, rows: Tensor, scale: Tensor) -> Tensor:
    """rows: [n, k], scale: [n] -> the sum over k, [n]."""
    x, floored = rows_of(rows, scale)
    return decode_rows_(quantizer, encode_rows(quantizer, x, floored), floored).sub_(rows).square_().sum(-1)
