"""One autograd function for every quantizer, and which implementation computes its two passes.

CUDA in fp32 or bf16: the Triton kernels, behind two operators that torch.compile takes as they are. All else: the plain
arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatscale.quant.kernels import operators, reference

if TYPE_CHECKING:
    from qatscale.quant.quantizers import Quantizer


class FakeQuantize(torch.autograd.Function):
    """(w, α) to ŵ. Keeps w and α for backward: under ZeRO-3 these are the parameters, which are gathered again by then."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, quantizer: Quantizer, grad_factor: float) -> Tensor:
        ctx.save_for_backward(w, alpha)
        ctx.quantizer, ctx.grad_factor = quantizer, grad_factor
        return quantize(quantizer, w, alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        w, alpha = ctx.saved_tensors
        grad_w, grad_alpha = gradients(ctx.quantizer, grads[0], w, alpha, ctx.grad_factor)
        needs_w, needs_alpha, *_ = ctx.needs_input_grad
        return grad_w if needs_w else None, grad_alpha if needs_alpha else None, None, None


def quantize(quantizer: Quantizer, w: Tensor, alpha: Tensor) -> Tensor:
    """ŵ by the implementation for these tensors."""
    if _has_kernels(w, alpha):
        return operators.quantize(w, alpha, quantizer.width)
    return reference.quantize(quantizer, w, alpha)


def gradients(
    quantizer: Quantizer, grad: Tensor, w: Tensor, alpha: Tensor, grad_factor: float
) -> tuple[Tensor, Tensor]:
    """(dL/dw, dL/dα) by the implementation for these tensors."""
    if _has_kernels(w, alpha):
        return operators.gradients(grad, w, alpha, quantizer.width, grad_factor)
    return reference.gradients(quantizer, grad, w, alpha, grad_factor)


def _has_kernels(w: Tensor, alpha: Tensor) -> bool:
    return w.is_cuda and operators.AVAILABLE and reference.compute_dtype(w, alpha) == torch.float32
