# mypy: disable-error-code="no-untyped-def"
"""The quantizers' passes as Triton kernels: each reads its inputs once, with fp32 arithmetic in registers.

A weight is taken as [rows, channels], a row being what shares a scale: an output row, or a group of input channels. A
program works on a tile of some rows; forward on so many channels of them, backward on all, one tile after the other,
because it sums dL/dα of its rows on the way. Nothing is added to memory from two programs, so a result is the same
every time.

Values equal those of `reference` to the bit: the division is IEEE's, a product and a sum are not fused, and rounding is
half to even by adding and taking away 1.5·2^23, beyond which fp32 has whole numbers only. (A level of 0 has no sign.)
NaN stays NaN.

Import it where a GPU is: Triton comes with torch's CUDA builds. With TRITON_INTERPRET=1 set before the import the
kernels run on CPU tensors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qatscale.quant.kernels.reference import ALPHA_FLOOR

if TYPE_CHECKING:
    from qatscale.quant.quantizers import Quantizer

_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23


@dataclass(frozen=True)
class Tile:
    """What a program works on at a time."""

    weights: int = 2048
    """A power of 2."""
    warps: int = 4

    def of(self, channels: int) -> tuple[int, int]:
        """(rows, channels) of a tile, both powers of 2, for rows of so many channels."""
        across = min(triton.next_power_of_2(max(1, channels)), self.weights)
        return self.weights // across, across


# 2048 bf16 weights on 4 warps are two 16-byte loads a thread, 4 KiB on their way to a program. Some ten programs fit a
# multiprocessor of an H100, which covers the 18 KiB that its memory wants in flight (3.35 TB/s x 0.7 us / 132).
FORWARD = Tile()
BACKWARD = Tile()


@triton.jit
def _clip(v, low, high):
    """`tl.clamp`, but NaN stays NaN also in the interpreter."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


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
    w_pointer, alpha_pointer, out_pointer, rows, channels,
    NAME: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr, INVERSE: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, FLOOR: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    exists = (row < rows)[:, None] & (column < channels)[None, :]
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    alpha = tl.load(alpha_pointer + row, mask=row < rows, other=1.0).to(tl.float32)
    a = tl.where(alpha < FLOOR, FLOOR, alpha)[:, None]
    w = tl.load(w_pointer + place, mask=exists, other=0.0).to(tl.float32)
    code = _encode(w, tl.div_rn(w, a), NAME, STEPS, SHIFT, LOW, HIGH)
    value = (code + SHIFT) * (a * INVERSE)
    tl.store(out_pointer + place, value.to(out_pointer.dtype.element_ty), mask=exists)


@triton.jit
def _gradients(
    grad_pointer, w_pointer, alpha_pointer, grad_w_pointer, grad_alpha_pointer, rows, channels, grad_factor,
    NAME: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr, INVERSE: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, FLOOR: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    start = row.to(tl.int64)[:, None] * channels
    alpha = tl.load(alpha_pointer + row, mask=row < rows, other=1.0).to(tl.float32)
    a = tl.where(alpha < FLOOR, FLOOR, alpha)[:, None]
    total = tl.full((TILE_ROWS, TILE_CHANNELS), 0.0, tl.float32)
    for first in range(0, channels, TILE_CHANNELS):
        column = first + tl.arange(0, TILE_CHANNELS)
        exists = (row < rows)[:, None] & (column < channels)[None, :]
        place = start + column[None, :]
        w = tl.load(w_pointer + place, mask=exists, other=0.0).to(tl.float32)
        grad = tl.load(grad_pointer + place, mask=exists, other=0.0).to(tl.float32)
        v = tl.div_rn(w, a)
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
    grad_alpha = tl.sum(total, axis=1) * grad_factor
    tl.store(grad_alpha_pointer + row, grad_alpha.to(grad_alpha_pointer.dtype.element_ty), mask=row < rows)


def quantize(quantizer: Quantizer, w: Tensor, alpha: Tensor, tile: Tile = FORWARD) -> Tensor:
    """As `reference.quantize`, for bf16 and fp32. A weight or scale that is not contiguous is copied."""
    w, alpha = w.contiguous(), alpha.contiguous()
    out = torch.empty_like(w)
    rows, channels = _shape(w, alpha)
    tile_rows, tile_channels = tile.of(channels)
    if w.numel():
        grid = (triton.cdiv(rows, tile_rows), triton.cdiv(channels, tile_channels))
        with _on(w):
            _quantize[grid](w, alpha, out, rows, channels, **_constants(quantizer, tile_rows, tile_channels, tile))
    return out


def gradients(
    quantizer: Quantizer, grad: Tensor, w: Tensor, alpha: Tensor, grad_factor: float, tile: Tile = BACKWARD
) -> tuple[Tensor, Tensor]:
    """As `reference.gradients`, for bf16 and fp32. What is not contiguous is copied."""
    grad, w, alpha = grad.contiguous(), w.contiguous(), alpha.contiguous()
    grad_w, grad_alpha = torch.empty_like(w), torch.zeros_like(alpha) if not w.numel() else torch.empty_like(alpha)
    rows, channels = _shape(w, alpha)
    tile_rows, tile_channels = tile.of(channels)
    if w.numel():
        with _on(w):
            _gradients[(triton.cdiv(rows, tile_rows),)](
                grad, w, alpha, grad_w, grad_alpha, rows, channels, grad_factor,
                **_constants(quantizer, tile_rows, tile_channels, tile),
            )  # fmt: skip
    return grad_w, grad_alpha


def _shape(w: Tensor, alpha: Tensor) -> tuple[int, int]:
    return alpha.numel(), w.numel() // max(1, alpha.numel())


def _on(w: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the present device; the interpreter has none."""
    return torch.cuda.device_of(w) if w.is_cuda else nullcontext()


def _constants(quantizer: Quantizer, tile_rows: int, tile_channels: int, tile: Tile) -> dict[str, Any]:
    return {
        "NAME": quantizer.name, "STEPS": float(quantizer.steps), "SHIFT": float(quantizer.shift),
        "INVERSE": 1 / quantizer.steps, "LOW": float(quantizer.low), "HIGH": float(quantizer.high),
        "FLOOR": ALPHA_FLOOR, "TILE_ROWS": tile_rows, "TILE_CHANNELS": tile_channels, "num_warps": tile.warps,
        "enable_fp_fusion": False,
    }  # fmt: skip
