"""Fake quantization of a weight, with straight-through gradients of the weight and its scale.

On CUDA, in fp32 or bf16, the passes are the Triton kernels; everywhere else they are the plain arithmetic. Both give
the same ŵ and dL/dw to the bit, and the same dL/dα, a sum, to rounding.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qatscale.errors import UserError
from qatscale.quant import reference
from qatscale.quant.bit_widths import BY_TEXT, Quantizer

_HAS_TRITON = find_spec("triton") is not None
if torch.version.cuda and not _HAS_TRITON:
    warnings.warn("Triton is not installed: weights on the GPU are quantized in plain arithmetic, slowly", stacklevel=2)


def fake_quantize(quantizer: Quantizer, w: Tensor, scale: Tensor, grad_factor: float = 1.0) -> Tensor:
    """The quantized weight ŵ in w's shape and dtype, differentiable in w and α (straight-through).

    w: [..., in]; scale: [...] or [..., groups]. `grad_factor` multiplies dL/dα: `quantizer.grad_factor(numel)` is LSQ's
    g, 1 the plain gradient. Arithmetic is in fp32 (float64 for float64 inputs). Autograd keeps references to w and α
    only, and recomputes the rest. ValueError where the shapes do not fit.
    """
    reference.check_shapes(w, scale)
    return _FakeQuantize.apply(w, scale, quantizer, grad_factor)


class _FakeQuantize(torch.autograd.Function):
    """Saves w and α for backward: under ZeRO-3 these are the parameters, which are gathered again by then."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, quantizer: Quantizer, grad_factor: float) -> Tensor:
        ctx.save_for_backward(w, scale)
        ctx.quantizer, ctx.grad_factor = quantizer, grad_factor
        if _has_kernels(w, scale):
            return torch.ops.qatscale.quantize.default(w, scale, quantizer.bits_text)
        return reference.quantize(quantizer, w, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        w, scale = ctx.saved_tensors
        if _has_kernels(w, scale):
            both = torch.ops.qatscale.gradients.default(grads[0], w, scale, ctx.quantizer.bits_text, ctx.grad_factor)
        else:
            both = reference.gradients(ctx.quantizer, grads[0], w, scale, ctx.grad_factor)
        needs_w, needs_scale, *_ = ctx.needs_input_grad
        return both[0] if needs_w else None, both[1] if needs_scale else None, None, None


def try_kernels(device: torch.device) -> None:
    """Compile and run a kernel on a GPU: what the machine lacks for that is a UserError now, and not at the switch."""
    try:
        fake_quantize(BY_TEXT["4"], torch.ones(1, 128, device=device), torch.ones(1, device=device))
    except Exception as error:  # of Triton, of a compiler, of CUDA
        fix = "Triton needs a C compiler and Python's headers (Debian, Ubuntu: apt install gcc python3-dev)."
        raise UserError("triton", None, f"the GPU's kernels cannot be compiled: {error}.", fix) from error


def _has_kernels(w: Tensor, scale: Tensor) -> bool:
    return w.is_cuda and _HAS_TRITON and reference.compute_dtype(w, scale) == torch.float32


# The kernels as operators, which torch.compile takes as they are, without a break in its graph. They are registered
# with plain schemas: the wrappers of `torch.library.custom_op` cost a small layer as much as its kernel.

_LIBRARY = torch.library.Library("qatscale", "FRAGMENT")
_LIBRARY.define("quantize(Tensor w, Tensor scale, str bits) -> Tensor")
_LIBRARY.define("gradients(Tensor grad, Tensor w, Tensor scale, str bits, float grad_factor) -> (Tensor, Tensor)")


def _run_quantize(w: Tensor, scale: Tensor, bits: str) -> Tensor:
    from qatscale.quant import triton_kernels

    return triton_kernels.quantize(BY_TEXT[bits], w, scale)


def _run_gradients(grad: Tensor, w: Tensor, scale: Tensor, bits: str, grad_factor: float) -> tuple[Tensor, Tensor]:
    from qatscale.quant import triton_kernels

    return triton_kernels.gradients(BY_TEXT[bits], grad, w, scale, grad_factor)


for _key in ("CUDA", "CPU"):  # on CPU in Triton's interpreter; `_has_kernels` sends no CPU tensor here
    _LIBRARY.impl("quantize", _run_quantize, _key)
    _LIBRARY.impl("gradients", _run_gradients, _key)


@torch.library.register_fake("qatscale::quantize", lib=_LIBRARY)
def _like_quantize(w: Tensor, scale: Tensor, bits: str) -> Tensor:  # noqa: ARG001 - the operator's signature
    return torch.empty_like(w, memory_format=torch.contiguous_format)


@torch.library.register_fake("qatscale::gradients", lib=_LIBRARY)
def _like_gradients(
    grad: Tensor, w: Tensor, scale: Tensor, bits: str, grad_factor: float  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    contiguous = torch.contiguous_format
    return torch.empty_like(w, memory_format=contiguous), torch.empty_like(scale, memory_format=contiguous)
