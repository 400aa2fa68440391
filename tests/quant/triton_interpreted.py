"""The Triton kernels on CPU tensors, in Triton's interpreter."""

from __future__ import annotations

import os
from types import ModuleType

import numpy as np
import pytest
import torch

REASON = "needs Triton (pip install triton), whose interpreter runs the GPU kernels on the CPU"


def interpreted_kernels() -> ModuleType:
    """`qatscale.quant.kernels.triton`, interpreted. Skips where Triton is not installed.

    The interpreter cuts fp32 off where it casts to bf16, and a GPU rounds to even (PTX cvt.rn): it gets that cast.
    And `tl.sum`, itself a kernel, is for the GPU where torch has imported Triton before.
    """
    pytest.importorskip("triton", reason=REASON)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
    try:
        from qatscale.quant.kernels import triton as kernels
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(builder, source, target):  # type: ignore[no-untyped-def]
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, target)
        rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    tl.sum = lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine)
    if cast.__name__ != "rounding_cast":
        interpreter.InterpreterBuilder.cast_impl = rounding_cast
    return kernels
