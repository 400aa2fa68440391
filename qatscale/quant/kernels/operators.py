"""The Triton kernels as operators, so that torch.compile takes them as they are, without a break in its graph.

Registered with plain schemas instead of `torch.library.custom_op`, whose wrappers cost a small layer as much as its
kernel. Autograd is the business of `dispatch.FakeQuantize`.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

AVAILABLE = find_spec("triton") is not None
if torch.version.cuda and not AVAILABLE:
    warnings.warn("Triton is not installed: weights on the GPU are quantized in plain arithmetic, slowly", stacklevel=2)

_LIBRARY = torch.library.Library("qatscale", "FRAGMENT")
_LIBRARY.define("quantize(Tensor w, Tensor alpha, str width) -> Tensor")
_LIBRARY.define("gradients(Tensor grad, Tensor w, Tensor alpha, str width, float grad_factor) -> (Tensor, Tensor)")

quantize = torch.ops.qatscale.quantize.default
"""(w, α, bits as text) -> ŵ."""
gradients = torch.ops.qatscale.gradients.default
"""(dL/dŵ, w, α, bits as text, g) -> (dL/dw, dL/dα)."""


def _run_quantize(w: Tensor, alpha: Tensor, width: str) -> Tensor:
    from qatscale.quant.kernels import triton
    from qatscale.quant.quantizers import BY_WIDTH

    return triton.quantize(BY_WIDTH[width], w, alpha)


def _run_gradients(grad: Tensor, w: Tensor, alpha: Tensor, width: str, grad_factor: float) -> tuple[Tensor, Tensor]:
    from qatscale.quant.kernels import triton
    from qatscale.quant.quantizers import BY_WIDTH

    return triton.gradients(BY_WIDTH[width], grad, w, alpha, grad_factor)


for _key in ("CUDA", "CPU"):  # on CPU in Triton's interpreter; dispatch never sends a CPU tensor here
    _LIBRARY.impl("quantize", _run_quantize, _key)
    _LIBRARY.impl("gradients", _run_gradients, _key)


@torch.library.register_fake("qatscale::quantize", lib=_LIBRARY)
def _like_quantize(w: Tensor, alpha: Tensor, width: str) -> Tensor:  # noqa: ARG001 - the operator's signature
    return torch.empty_like(w, memory_format=torch.contiguous_format)


@torch.library.register_fake("qatscale::gradients", lib=_LIBRARY)
def _like_gradients(
    grad: Tensor, w: Tensor, alpha: Tensor, width: str, grad_factor: float  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    contiguous = torch.contiguous_format
    return torch.empty_like(w, memory_format=contiguous), torch.empty_like(alpha, memory_format=contiguous)
