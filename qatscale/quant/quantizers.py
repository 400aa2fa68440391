"""Weight quantizers of the ParetoQ family: 1, 1.58, 2, 3, 4, 5, 6 and 8 bits, with a learned scale α per row or group.

Sources: ParetoQ (arXiv 2502.02631) and its released code; LSQ (arXiv 1902.08153). With v = w / max(α, 1e-5):

========  ====================  ===================================  ==================  =========================
bits      name                  forward                              dL/dw kept where    dL/dα before g
========  ====================  ===================================  ==================  =========================
1         elastic binarization  sign(w)·α, sign(0) = +1              everywhere          sign(w)
1.58      SEQ ternary           round(1.5·clip(v, ±.99))/1.5·α       abs(v) <= .99       inside: q−v; outside: ±1
2         SEQ                   (round(2·clip(v, ±.99)−.5)+.5)/2·α   abs(v) <= .99       inside: q−v; outside: ±.75
3 ... 8   LSQ                   clamp(round(v), −Qn, Qp)·α           −Qn <= v <= Qp      inside: q−v; outside: −Qn, Qp
========  ====================  ===================================  ==================  =========================

q is the level that v takes. dL/dα is summed over the row or group, then multiplied by g = 1/sqrt(numel(W)·Qp).
At 1 bit the reference keeps dL/dw where abs(v) <= 1 alone. There a row whose α falls has ever fewer weights that train,
and hardly one comes back; with dL/dw everywhere no row stays behind (analysis/benchmarks/one_bit_scales.md).
The clip is ±0.99 as released: with the printed formula's ±1, v = 1 would give a fifth level. Rounding is half to even.
The reference stops at 4 bits; 5, 6 and 8 follow LSQ's pattern.

Shapes, here and in the layers: a weight is [..., in]; its scale is [...] (one per row) or [..., groups], where each
group is in/groups neighbouring input channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from qatscale.errors import UserError
from qatscale.quant.kernels.dispatch import FakeQuantize
from qatscale.quant.kernels.reference import ALPHA_FLOOR, decode_, encode, rows_of

SEQ_CLIP = 0.99
BINARY_SCALE_LR_RATIO = 0.1
"""Measured (analysis/benchmarks/one_bit_scales.md): at 1, up to a fifth of all rows ends with α at ALPHA_FLOOR."""

PTQ_COARSE = 40
PTQ_FINE = 20
PTQ_RANGE = (0.05, 1.6)
"""`ptq_scale` tries α within these multiples of the initial α: above 1 for SEQ, whose outermost level is below α."""
_PTQ_CHUNK = 1 << 22
"""Weights that `ptq_scale` works on at a time, so that its buffers do not grow with the matrix."""

Name = Literal["binary", "ternary", "seq", "lsq"]


@dataclass(frozen=True)
class Quantizer:
    """One bit width. A code c stands for the level (c + shift)/steps, in units of α."""

    bits: float
    name: Name
    qn: int
    """The lowest code is -qn."""
    qp: int
    """The highest code; Qp in g and, above 1 bit, in the learning rate of the scales."""
    steps: float
    """Levels per α."""
    shift: float
    low: float
    """The weight's gradient is kept where low <= v <= high."""
    high: float
    storage_bits: int
    """Bits that hold one code (1.58 bits need 2)."""

    @property
    def width(self) -> str:
        """The bits as text: 1.58 -> '1.58', 4 -> '4'."""
        return f"{self.bits:g}"

    @cached_property
    def code_values(self) -> tuple[int, ...]:
        """Every code, ascending. Binary has no code 0."""
        return (-1, 1) if self.name == "binary" else tuple(range(-self.qn, self.qp + 1))

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Every value a weight can take, in units of α, ascending."""
        return tuple((code + self.shift) / self.steps for code in self.code_values)

    @property
    def scale_lr_ratio(self) -> float:
        """The learning rate of α over that of the weights: α is about a Qp-th of its largest weight.

        At 1 bit BINARY_SCALE_LR_RATIO: α is the mean of abs(w) there, which AdamW crosses in few steps at their rate.
        """
        return BINARY_SCALE_LR_RATIO if self.name == "binary" else 1 / self.qp

    def grad_factor(self, numel: int) -> float:
        """LSQ's g = 1/sqrt(numel·Qp). `numel` counts the whole matrix, also where a process holds only a part of it."""
        return 1.0 / math.sqrt(numel * self.qp)

    def fake_quantize(self, w: Tensor, alpha: Tensor, grad_factor: float = 1.0) -> Tensor:
        """The quantized weight as a tensor of w's shape and dtype, differentiable in w and α (straight-through).

        `grad_factor` multiplies dL/dα: `self.grad_factor(numel)` for LSQ's g, 1 for the plain gradient. Arithmetic is
        in fp32 (float64 for float64 inputs). Autograd keeps references to w and α only, and recomputes the rest.
        """
        _check_shapes(w, alpha)
        return FakeQuantize.apply(w, alpha, self, grad_factor)

    @torch.no_grad()
    def codes(self, w: Tensor, alpha: Tensor) -> Tensor:
        """The integer code of every weight: int8, w's shape, values among `code_values`."""
        _check_shapes(w, alpha)
        return encode(self, *rows_of(w, alpha)).to(torch.int8).reshape(w.shape)

    @torch.no_grad()
    def decode(self, codes: Tensor, alpha: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weights that `codes` stand for. With dtype = w's (None: α's) exactly what `fake_quantize(w, α)` gives."""
        _check_shapes(codes, alpha)
        compute = torch.promote_types(torch.promote_types(dtype or alpha.dtype, alpha.dtype), torch.float32)
        _, a = rows_of(codes, alpha, compute)
        values = decode_(self, codes.to(compute).reshape(a.shape[0], -1), a)
        return values.to(dtype or alpha.dtype).reshape(codes.shape)

    @torch.no_grad()
    def initial_scale(self, w: Tensor, group_size: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """α at the switch: mean|w| for 1 bit, max|w|/Qp above; never below ALPHA_FLOOR.

        w: [..., in] -> α: [...] or [..., in/group_size], in w's dtype (at least fp32). dtype: the type in which the
        forward pass holds w and α; None: that of the result.

        α is rounded up where forward would otherwise see the row's largest weight above Qp, in `dtype`: whether a
        weight on the edge is clipped decides its gradient and most of its scale's, and must not hang on a last bit.
        """
        size = w.abs().to(torch.promote_types(w.dtype, torch.float32))
        if group_size is not None:
            size = size.unflatten(-1, (-1, group_size))
        if self.name == "binary":
            return size.mean(-1).clamp_min(ALPHA_FLOOR)
        dtype = dtype or size.dtype
        largest = size.amax(-1).to(dtype).to(size.dtype)
        alpha = (largest / self.qp).to(dtype)
        outside = largest / alpha.to(size.dtype) > self.qp
        alpha = torch.where(outside, alpha.nextafter(torch.full_like(alpha, math.inf)), alpha)
        return alpha.to(size.dtype).clamp_min(ALPHA_FLOOR)

    @torch.no_grad()
    def ptq_scale(self, w: Tensor, group_size: int | None = None) -> Tensor:
        """Post-training quantization: the α per row or group with the least squared error of the quantized weights.

        A grid search in two passes: PTQ_COARSE multiples of the initial α, evenly spaced in the logarithm over
        PTQ_RANGE, then PTQ_FINE between the neighbours of the best. The initial α is among the candidates, so the
        result is never worse. On rows of 128 Gaussian weights the mean error is within 0.5 % of the best of 1500
        scales up to 6 bits, within 3 % at 8. For 1 bit the initial α, mean|w|, is the exact optimum. Shapes as in
        `initial_scale`.
        """
        alpha = self.initial_scale(w, group_size)
        if self.name == "binary" or alpha.numel() == 0:
            return alpha
        rows = w.reshape(alpha.numel(), -1)
        chunk = max(1, _PTQ_CHUNK // rows.shape[1])
        parts = [self._search(*part) for part in zip(rows.split(chunk), alpha.reshape(-1).split(chunk), strict=True)]
        return torch.cat(parts).reshape(alpha.shape)

    def _search(self, rows: Tensor, start: Tensor) -> Tensor:
        """rows: [n, k], start: [n] -> the best α of every row, [n]."""
        target = rows.to(start.dtype)
        best, least = start, self._squared_error(target, start)
        low, high = (math.log(bound) for bound in PTQ_RANGE)
        width = (high - low) / (PTQ_COARSE - 1)
        for index in range(PTQ_COARSE):
            best, least = self._better(target, start * math.exp(low + width * index), best, least)
        centre = best
        for index in range(PTQ_FINE):
            offset = width * (2 * (index + 0.5) / PTQ_FINE - 1)
            best, least = self._better(target, centre * math.exp(offset), best, least)
        return best

    def _better(self, target: Tensor, alpha: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        error = self._squared_error(target, alpha)
        better = error < least
        return torch.where(better, alpha, best), torch.where(better, error, least)

    def _squared_error(self, target: Tensor, alpha: Tensor) -> Tensor:
        x, a = rows_of(target, alpha)
        return decode_(self, encode(self, x, a), a).sub_(target).square_().sum(-1)


def _lsq(bits: int) -> Quantizer:
    qn, qp = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    return Quantizer(bits, "lsq", qn, qp, steps=1, shift=0, low=-qn, high=qp, storage_bits=bits)


QUANTIZERS: dict[float, Quantizer] = {
    1: Quantizer(1, "binary", 1, 1, steps=1, shift=0, low=-math.inf, high=math.inf, storage_bits=1),
    1.58: Quantizer(1.58, "ternary", 1, 1, steps=1.5, shift=0, low=-SEQ_CLIP, high=SEQ_CLIP, storage_bits=2),
    2: Quantizer(2, "seq", 2, 1, steps=2, shift=0.5, low=-SEQ_CLIP, high=SEQ_CLIP, storage_bits=2),
    **{bits: _lsq(bits) for bits in (3, 4, 5, 6, 8)},
}

BY_WIDTH: dict[str, Quantizer] = {quantizer.width: quantizer for quantizer in QUANTIZERS.values()}


def get_quantizer(bits: float) -> Quantizer:
    """The quantizer of a bit width. UserError for a width that has none."""
    if bits not in QUANTIZERS:
        raise UserError("bits", bits, f"a weight has {', '.join(map(str, QUANTIZERS))} bits when quantized.")
    return QUANTIZERS[bits]


@dataclass(frozen=True)
class BitsRule:
    """A layer's bits as a function of the bits asked for: the recipe's in training, a view's in that view."""

    least: float = 1
    fixed: float | None = None

    def at(self, bits: float) -> float:
        return self.fixed if self.fixed is not None else max(self.least, bits)


def _check_shapes(w: Tensor, alpha: Tensor) -> None:
    per_row = alpha.shape == w.shape[:-1]
    per_group = alpha.dim() == w.dim() and alpha.shape[:-1] == w.shape[:-1]
    if not per_row and not (per_group and alpha.shape[-1] > 0 and w.shape[-1] % alpha.shape[-1] == 0):
        raise ValueError(f"a scale of shape {list(alpha.shape)} does not fit a weight of shape {list(w.shape)}")
