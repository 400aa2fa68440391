"""A quantized matrix as every format stores it: integers times a scale.

A level of `bit_widths.py` is (code + shift)/steps in units of α. Written as `integer · scale`, with

========  ==============  ===============
bits      integers        scale
========  ==============  ===============
1         ±1              α
1.58      -1, 0, 1        α · (1/1.5)
2         ±1, ±3          α/4
3 ... 8   -2^(b-1) ...    α
========  ==============  ===============

the product in fp32 is, to the bit, the weight that the forward pass computes in fp32. The factors of 2 are exact, and
the forward pass, too, computes ternary levels as code · (α · (1/1.5)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qatscale.export.integers import integer_range, integer_step
from qatscale.quant.bit_widths import SCALE_FLOOR, Quantizer


@dataclass(frozen=True)
class QuantizedMatrix:
    quantizer: Quantizer
    codes: Tensor
    """int8 [rows, in], as `quant.reference.encode` returns them."""
    scale: Tensor
    """fp32 [rows, groups]; a group is in/groups neighbouring input channels."""

    @classmethod
    def from_codes(cls, quantizer: Quantizer, codes: Tensor, alpha: Tensor) -> QuantizedMatrix:
        """alpha: [rows] or [rows, groups], as the forward pass sees it, which raises it to SCALE_FLOOR."""
        scale = alpha.float().clamp_min(SCALE_FLOOR).reshape(len(codes), -1)
        if quantizer.name == "seq":
            scale = scale / 4
        elif quantizer.name == "ternary":
            scale = scale * (1 / quantizer.steps)
        return cls(quantizer, codes, scale)

    @property
    def integers(self) -> Tensor:
        """int8 [rows, in]."""
        return 2 * self.codes + 1 if self.quantizer.name == "seq" else self.codes

    @property
    def unsigned(self) -> Tensor:
        """int8 [rows, in]: 0 for the lowest level, one more for each next. At 8 bits they wrap around."""
        (lowest, _), step = integer_range(self.quantizer), integer_step(self.quantizer)
        return ((self.integers.to(torch.int16) - lowest) // step).to(torch.uint8).view(torch.int8)

    def permuted(self, rows: Tensor) -> QuantizedMatrix:
        return replace(self, codes=self.codes[rows], scale=self.scale[rows])

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, [rows, in]: the product in fp32, rounded to `dtype`."""
        rows, groups = self.scale.shape
        return (self.integers.float().view(rows, groups, -1) * self.scale.unsqueeze(-1)).view(rows, -1).to(dtype)
