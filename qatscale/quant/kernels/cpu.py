"""The quantizers' passes on CPU: few operations, in place, over blocks of rows, in buffers that are there already.

What costs is new memory: the first touch of a page takes the operating system longer than the arithmetic on it. So all
but the result is computed in a block's buffers, which are kept, and stay in the cache. Every element goes through the
arithmetic of `reference`, or through one that rounds alike (scaled by a power of two), so that values and dL/dw are the
same to the bit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qatscale.quant.kernels.reference import rows_of

if TYPE_CHECKING:
    from qatscale.quant.quantizers import Quantizer

BLOCK = 1 << 18
"""Weights of a block: 1 MiB in fp32. In smaller ones, calling the operations costs more than what they do."""
SMALL = 1 << 16
"""Up to so many weights the plain arithmetic is as fast."""
_SHARE = 1 << 15
"""Weights that torch gives a thread at least; with many threads a block grows so that each has some."""
_LARGEST = 1 << 20
_NARROW = 64
"""Rows shorter than this are summed by products of vectors: `sum` costs about as much a row as it does 64 weights."""
_kept = threading.local()

_hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input
"""(g, v, low, high): g where low < v < high, else 0."""


def quantize(quantizer: Quantizer, w: Tensor, alpha: Tensor) -> Tensor:
    """As `reference.quantize`, in fp32 arithmetic."""
    x, a = rows_of(w, alpha)
    unit = _unit(quantizer, a)
    level = unit * (1 / quantizer.steps) if quantizer.name == "ternary" else unit
    out = torch.empty(x.shape, dtype=x.dtype)
    for rows in _blocks(x):
        block = out[rows] if x.dtype == torch.float32 else _buffer(0, out[rows])
        _level_(quantizer, _divide(quantizer, x[rows], unit[rows], block), block).mul_(level[rows])
        if x.dtype != torch.float32:
            out[rows] = block
    return out.view(w.shape)


def gradients(
    quantizer: Quantizer, grad: Tensor, w: Tensor, alpha: Tensor, grad_factor: float
) -> tuple[Tensor, Tensor]:
    """As `reference.gradients`, in fp32 arithmetic."""
    x, a = rows_of(w, alpha)
    upstream = grad.reshape(x.shape)
    unit = a if quantizer.name == "binary" else _unit(quantizer, a)
    bounds = [_just_outside(_edge(quantizer, bound)) for bound in (quantizer.low, quantizer.high)]
    grad_w = torch.empty(x.shape, dtype=x.dtype)
    sums = torch.empty(len(x), dtype=torch.float32)
    for rows in _blocks(x):
        v, slope = _buffer(0, grad_w[rows]), _buffer(1, grad_w[rows])
        _divided(x[rows], unit[rows], v)
        if x.dtype == torch.float32:
            g = upstream[rows]
            _hardtanh_backward(g, v, *bounds, grad_input=grad_w[rows])
        else:
            g = _buffer(2, grad_w[rows]).copy_(upstream[rows])
            grad_w[rows] = _hardtanh_backward(g, v, *bounds, grad_input=slope)
        _slope_(quantizer, x[rows], v, bounds, slope)
        if x.shape[1] < _NARROW:
            torch.linalg.vecdot(slope, g, out=sums[rows])
        else:
            torch.sum(slope.mul_(g), -1, out=sums[rows])
    scale = grad_factor * {"binary": 2.0, "seq": 0.5}.get(quantizer.name, 1.0)
    return grad_w.view(w.shape), sums.mul_(scale).to(alpha.dtype).view(alpha.shape)


def _blocks(x: Tensor) -> Iterator[slice]:
    """Rows of x: [rows, k], a block at a time."""
    block = min(max(BLOCK, _SHARE * torch.get_num_threads()), _LARGEST)
    step = max(1, block // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        yield slice(start, start + step)


def _buffer(number: int, like: Tensor) -> Tensor:
    """One of this thread's fp32 buffers in the shape of `like`; it holds what was left there."""
    buffers = _kept.__dict__.setdefault("buffers", {})
    if number not in buffers or buffers[number].numel() < like.numel():
        with torch.inference_mode(False):  # made within it, it could not be written to outside
            buffers[number] = torch.empty(like.numel(), dtype=torch.float32, device="cpu")
    return buffers[number][: like.numel()].view(like.shape)


# v is measured in α, but for `seq`, whose levels are odd quarters of it, in α/2: that saves multiplications by 2. A
# binary weight is ±1/2 of 2·α; its slope is computed as ±1/2 too.


def _unit(quantizer: Quantizer, a: Tensor) -> Tensor:
    return a * {"binary": 2.0, "seq": 0.5}.get(quantizer.name, 1.0)


def _edge(quantizer: Quantizer, bound: float) -> float:
    """A bound of v, as fp32 has it."""
    return _single(bound) * (2 if quantizer.name == "seq" else 1)


def _divided(x: Tensor, unit: Tensor, out: Tensor) -> Tensor:
    """x/unit. A cast of its own, as mixed operands would be cast in new memory."""
    return torch.div(x, unit, out=out) if x.dtype == torch.float32 else out.copy_(x).div_(unit)


def _divide(quantizer: Quantizer, x: Tensor, unit: Tensor, out: Tensor) -> Tensor:
    """What `_level_` takes: v, or x itself where its sign is enough."""
    return x if quantizer.name == "binary" else _divided(x, unit, out)


def _level_(quantizer: Quantizer, v: Tensor, out: Tensor) -> Tensor:
    """The level of v in its units; of `ternary` the code, whose level is 2/3 of it. `out` may be v."""
    if quantizer.name == "binary":
        return torch.ge(v, 0, out=out).sub_(0.5)
    torch.clamp(v, _edge(quantizer, quantizer.low), _edge(quantizer, quantizer.high), out=out)
    if quantizer.name == "seq":
        return out.sub_(0.5).round_().add_(0.5)
    return (out.mul_(quantizer.steps) if quantizer.name == "ternary" else out).round_()


def _slope_(quantizer: Quantizer, x: Tensor, v: Tensor, bounds: list[float], out: Tensor) -> None:
    """dŵ/dα of every weight, in v's units. Overwrites v."""
    if quantizer.name == "binary":
        _level_(quantizer, x, out)
        return
    _level_(quantizer, v, out)
    if quantizer.name == "ternary":  # the released slope outside is the code ±1; inside, code - (v + code/3) = q - v
        within = torch.add(v, out, alpha=1 - 1 / quantizer.steps, out=_buffer(3, v))
        _hardtanh_backward(within, v, *bounds, grad_input=v)
    else:
        _hardtanh_backward(v, v, *bounds, grad_input=v)
    out.sub_(v)


@cache
def _single(value: float) -> float:
    """Rounded to fp32, as torch rounds a number before it compares."""
    return torch.tensor(value, dtype=torch.float32).item()


@cache
def _just_outside(bound: float) -> float:
    """The next fp32 number further from 0."""
    edge = torch.tensor(bound, dtype=torch.float32)
    return edge.nextafter(torch.copysign(torch.tensor(math.inf), edge)).item()
