"""The quantizers of the ParetoQ family as numbers, one per bit width. No torch: see `fake_quantize` for the tensors.

Sources: ParetoQ (arXiv 2502.02631) and its released code; LSQ (arXiv 1902.08153). A row or group of weights shares a
learned scale α. With v = w / max(α, SCALE_FLOOR):

========  ====================  ===================================  ==================  =========================
bits      name                  forward                              dL/dw kept where    dL/dα before g
========  ====================  ===================================  ==================  =========================
1         elastic binarization  sign(w)·α, sign(0) = +1              everywhere          sign(w)
1.58      SEQ ternary           round(1.5·clip(v, ±.99))/1.5·α       abs(v) <= .99       inside: q−v; outside: ±1
2         SEQ                   (round(2·clip(v, ±.99)−.5)+.5)/2·α   abs(v) <= .99       inside: q−v; outside: ±.75
3 ... 8   LSQ                   clamp(round(v), −Qn, Qp)·α           −Qn <= v <= Qp      inside: q−v; outside: −Qn, Qp
========  ====================  ===================================  ==================  =========================

q is the level that v takes. dL/dα is summed over the row or group, then multiplied by g = 1/sqrt(numel(W)·Qp).

- At 1 bit the reference keeps dL/dw only where abs(v) <= 1. A row whose α falls then has ever fewer weights that train,
  and hardly any such row recovers. With dL/dw everywhere, none is lost (analysis/benchmarks/one_bit_scales.md).
- The clip is ±0.99 as in the released code. With ±1, as the paper prints it, v = 1 would give a fifth level.
- Rounding is half to even.
- The reference stops at 4 bits; wider ones follow LSQ's pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qatlaw.bit_widths import BIT_WIDTHS, BIT_WIDTHS_TEXT, EMBEDDING_LEAST_BITS, UNQUANTIZED_BITS
from qatscale.errors import UserError

SCALE_FLOOR = 1e-5
"""Forward and backward use max(α, SCALE_FLOOR), as the released code does. The gradient still reaches an α below it."""
SEQ_CLIP = 0.99
BINARY_SCALE_LR_RATIO = 0.1
"""Measured (analysis/benchmarks/one_bit_scales.md): at a ratio of 1, up to a fifth of all rows end at SCALE_FLOOR."""


@dataclass(frozen=True)
class Quantizer:
    """The numbers of one bit width. A code c stands for the level (c + shift)/steps, in units of α."""

    bits: float
    name: Literal["binary", "ternary", "seq", "lsq"]
    qn: int
    """The lowest code is -qn."""
    qp: int
    """The highest code. It is Qp in g and, above 1 bit, in the learning rate of the scales."""
    steps: float
    """Levels per α."""
    shift: float
    low: float
    """The weight's gradient is kept where low <= v <= high."""
    high: float
    storage_bits: int
    """Bits that hold one code (1.58 bits need 2)."""

    @property
    def bits_text(self) -> str:
        """1.58 -> '1.58', 4 -> '4'."""
        return f"{self.bits:g}"

    @property
    def scale_lr_ratio(self) -> float:
        """The learning rate of α over that of the weights: 1/Qp, as α starts at a Qp-th of its largest weight.

        At 1 bit α is the mean of abs(w), which AdamW would cross in a few steps at the weights' rate.
        """
        return BINARY_SCALE_LR_RATIO if self.name == "binary" else 1 / self.qp

    def grad_factor(self, numel: int) -> float:
        """LSQ's g = 1/sqrt(numel·Qp). `numel` counts the full matrix, also where a process holds only a part of it."""
        return 1.0 / math.sqrt(numel * self.qp)


def _quantizer(bits: float) -> Quantizer:
    if bits == 1:
        return Quantizer(1, "binary", 1, 1, steps=1, shift=0, low=-math.inf, high=math.inf, storage_bits=1)
    if bits == 1.58:
        return Quantizer(1.58, "ternary", 1, 1, steps=1.5, shift=0, low=-SEQ_CLIP, high=SEQ_CLIP, storage_bits=2)
    if bits == 2:
        return Quantizer(2, "seq", 2, 1, steps=2, shift=0.5, low=-SEQ_CLIP, high=SEQ_CLIP, storage_bits=2)
    assert bits in range(3, 9), f"no quantizer has {bits:g} bits"  # codes are int8
    qn, qp = 2 ** (int(bits) - 1), 2 ** (int(bits) - 1) - 1
    return Quantizer(bits, "lsq", qn, qp, steps=1, shift=0, low=-qn, high=qp, storage_bits=int(bits))


QUANTIZERS: dict[float, Quantizer] = {bits: _quantizer(bits) for bits in BIT_WIDTHS}
BY_TEXT: dict[str, Quantizer] = {quantizer.bits_text: quantizer for quantizer in QUANTIZERS.values()}


def get_quantizer(bits: float) -> Quantizer:
    """The quantizer of a bit width. UserError for one that has none."""
    if bits not in QUANTIZERS:
        raise UserError("bits", bits, f"a weight has {BIT_WIDTHS_TEXT} bits when quantized.")
    return QUANTIZERS[bits]


@dataclass(frozen=True)
class BitsRule:
    """A layer's bits as a function of the bits asked for: the recipe's in training, a view's in that view."""

    least: float = 1
    fixed: float | None = None

    def at(self, bits: float) -> float:
        return self.fixed if self.fixed is not None else max(self.least, bits)


def embedding_rule(setting: int | Literal["auto"], tied: bool) -> BitsRule | None:
    """The bits of embedding and head under `qat.embedding_bits`; None: they stay in full precision."""
    if setting == "auto":
        return BitsRule(least=EMBEDDING_LEAST_BITS) if tied else None
    return None if setting == UNQUANTIZED_BITS else BitsRule(fixed=setting)
