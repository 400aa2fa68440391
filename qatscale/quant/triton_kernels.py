# mypy: disable-error-code="no-untyped-def"
"""The quantizers' passes as Triton kernels: each reads its inputs once, with fp32 arithmetic in registers.

The kernels see a weight as [rows, channels], where a row shares a scale: an output row, or a group of input channels.
A forward program works on one tile of rows and channels. A backward program works on all channels of its rows, tile
after tile, and sums their dL/dα. No two programs add to the same memory, so results are reproducible.

Values equal those of `reference` to the bit: quotients are IEEE's, all other products and sums are not fused, and
rounding is half to even by adding and subtracting 1.5·2^23, beyond which fp32 has integers only. (A level of 0 has no
sign.) NaN stays NaN.

Importing this module needs Triton, which torch's CUDA builds bring. With TRITON_INTERPRET=1 set before the import, the
kernels run on CPU tensors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qatscale.quant.bit_widths import SCALE_FLOOR, Quantizer

_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23


@dataclass(frozen=True)
class Tile:
    """The weights that a program works on at a time."""

    weights: int = 2048
    """A power of 2."""
    warps: int = 4
    narrowest: int = 256
    """Channels that a tile has at least, where a row has them."""

    def of(self, channels: int) -> tuple[int, int]:
        """(rows, channels) of a tile, both powers of 2, for rows of so many channels: the widest that masks fewest."""
        widest = min(triton.next_power_of_2(max(1, channels)), self.weights)
        widths = [widest >> i for i in range(widest.bit_length()) if widest >> i >= min(self.narrowest, widest)]
        across = min(widths, key=lambda width: triton.cdiv(channels, width) * width)
        return self.weights // across, across


# 2048 bf16 weights on 4 warps are two 16-byte loads a thread, 4 KiB on their way to a program. Some ten programs fit a
# multiprocessor of an H100, which covers the 18 KiB that its memory wants in flight (3.35 TB/s x 0.7 us / 132).
FORWARD = Tile()
# A program works on all channels of its rows: with narrower tiles it would have more rows, and there would be too few.
BACKWARD = Tile(narrowest=512)


@triton.jit
def _clip(v, low, high):
    """`tl.clamp`, but NaN stays NaN also in the interpreter."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def _divide(w, scale, reciprocal):
    """IEEE's w/scale from its rounded reciprocal, by Markstein's correction (Brisebarre, Muller & Raina 2004, sec. 3).

    True where nothing overflows or underflows: for abs(w) > 1e-30, abs(w/scale) < 1e38 and scale < 1e37. For smaller w
    the error is below 1e-30, which changes no code. An overflow gives NaN.
    """
    quotient = w * reciprocal
    return tl.fma(tl.fma(-quotient, scale, w), reciprocal, quotient)


@triton.jit
def _encode(w, v, NAME: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes as fp32. v: w/α, which a binary weight does not need."""
    if NAME == "binary":
        code = tl.where(w >= 0.0, 1.0, -1.0)
    else:
        scaled = _clip(v, LOW, HIGH) * STEPS - SHIFT
        code = (scaled + _ROUNDING) - _ROUNDING
    return code


@triton.jit
def _quantize(
    w_pointer, scale_pointer, out_pointer, rows, channels,
    NAME: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr, INVERSE: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, FLOOR: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    exists = (row < rows)[:, None] & (column < channels)[None, :]
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    scale = tl.load(scale_pointer + row, mask=row < rows, other=1.0).to(tl.float32)
    floored = tl.where(scale < FLOOR, FLOOR, scale)[:, None]
    w = tl.load(w_pointer + place, mask=exists, other=0.0).to(tl.float32)
    code = _encode(w, _divide(w, floored, tl.div_rn(1.0, floored)), NAME, STEPS, SHIFT, LOW, HIGH)
    value = (code + SHIFT) * (floored * INVERSE)
    tl.store(out_pointer + place, value.to(out_pointer.dtype.element_ty), mask=exists)


@triton.jit
def _gradients(
    grad_pointer, w_pointer, scale_pointer, grad_w_pointer, grad_scale_pointer, rows, channels, grad_factor,
    NAME: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr, INVERSE: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, FLOOR: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    start = row.to(tl.int64)[:, None] * channels
    scale = tl.load(scale_pointer + row, mask=row < rows, other=1.0).to(tl.float32)
    floored = tl.where(scale < FLOOR, FLOOR, scale)[:, None]
    reciprocal = tl.div_rn(1.0, floored)
    total = tl.full((TILE_ROWS, TILE_CHANNELS), 0.0, tl.float32)
    for first in range(0, channels, TILE_CHANNELS):
        column = first + tl.arange(0, TILE_CHANNELS)
        exists = (row < rows)[:, None] & (column < channels)[None, :]
        place = start + column[None, :]
        w = tl.load(w_pointer + place, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(grad_pointer + place, mask=exists, other=0.0).to(tl.float32)
        v = _divide(w, floored, reciprocal)
        inside = (v >= LOW) & (v <= HIGH)
        grad_w = tl.where(inside, grad, 0.0)
        tl.store(grad_w_pointer + place, grad_w.to(grad_w_pointer.dtype.element_ty), mask=exists)
        code = _encode(w, v, NAME, STEPS, SHIFT, LOW, HIGH)
        if NAME == "binary":
            slope = code
        elif NAME == "ternary":  # outside the released slope is the code ±1; inside, code - (v + code/3) = q - v
            slope = code - tl.where(inside, v + code * (1.0 - INVERSE), 0.0)
        else:
            slope = (code + SHIFT) * INVERSE - tl.where(inside, v, 0.0)
        total += slope * grad
    grad_scale = tl.sum(total, axis=1) * grad_factor
    tl.store(grad_scale_pointer + row, grad_scale.to(grad_scale_pointer.dtype.element_ty), mask=row < rows)


def quantize(quantizer: Quantizer, w: Tensor, scale: Tensor, tile: Tile = FORWARD) -> Tensor:
    """As `reference.quantize`, for bf16 and fp32. A weight or scale that is not contiguous is copied."""
    w, scale = w.contiguous(), scale.contiguous()
    out = torch.empty_like(w)
    rows, channels = _shape(w, scale)
    tile_rows, tile_channels = tile.of(channels)
    if w.numel():
        grid = (triton.cdiv(rows, tile_rows), triton.cdiv(channels, tile_channels))
        with _on(w):
            _quantize[grid](w, scale, out, rows, channels, **_constants(quantizer, tile_rows, tile_channels, tile))
    return out


def gradients(
    quantizer: Quantizer, grad: Tensor, w: Tensor, scale: Tensor, grad_factor: float, tile: Tile = BACKWARD
) -> tuple[Tensor, Tensor]:
    """As `reference.gradients`, for bf16 and fp32. What is not contiguous is copied."""
    grad, w, scale = grad.contiguous(), w.contiguous(), scale.contiguous()
    grad_w, grad_scale = torch.empty_like(w), torch.zeros_like(scale) if not w.numel() else torch.empty_like(scale)
    rows, channels = _shape(w, scale)
    tile_rows, tile_channels = tile.of(channels)
    if w.numel():
        with _on(w):
            _gradients[(triton.cdiv(rows, tile_rows),)](
                grad, w, scale, grad_w, grad_scale, rows, channels, grad_factor,
                **_constants(quantizer, tile_rows, tile_channels, tile),
            )  # fmt: skip
    return grad_w, grad_scale


def _shape(w: Tensor, scale: Tensor) -> tuple[int, int]:
    return scale.numel(), w.numel() // max(1, scale.numel())


def _on(w: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the present device; the interpreter has none."""
    return torch.cuda.device_of(w) if w.is_cuda else nullcontext()


def _constants(quantizer: Quantizer, tile_rows: int, tile_channels: int, tile: Tile) -> dict[str, Any]:
    return {
        "NAME": quantizer.name, "STEPS": float(quantizer.steps), "SHIFT": float(quantizer.shift),
        "INVERSE": 1 / quantizer.steps, "LOW": float(quantizer.low), "HIGH": float(quantizer.high),
        "FLOOR": SCALE_FLOOR, "TILE_ROWS": tile_rows, "TILE_CHANNELS": tile_channels, "num_warps": tile.warps,
        "enable_fp_fusion": False,
    }  # fmt: skip
