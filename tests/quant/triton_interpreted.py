"""The Triton kernels on CPU tensors, in Triton's interpreter."""

from __future__ import annotations

import os
from types import ModuleType

import numpy as np
import pytest
import torch

Array = np.ndarray


def fma(x: Array, y: Array, z: Array) -> Array:
    """x·y + z of fp32 numbers, rounded once, as fma.rn.f32.

    In double precision the product is exact and the sum is rounded to odd (Boldo & Melquiond 2008): cut off, its last
    bit set where bits are lost. Rounding that to fp32 is then correct.
    """
    with np.errstate(all="ignore"):
        product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = product + z
        part = total - product
        lost = (product - (total - part)) + (z - part)  # exactly (Knuth's TwoSum)
        bits = np.atleast_1d(total).view(np.int64)
        fixed = np.atleast_1d((lost != 0) & np.isfinite(lost)) & (bits % 2 == 0)
        step = np.where(np.atleast_1d((lost > 0) == (total > 0)), 1, -1)
        return (bits + step * fixed).view(np.float64).reshape(np.shape(total)).astype(np.float32)


REASON = "needs Triton (pip install triton), whose interpreter runs the GPU kernels on the CPU"


def interpreted_kernels() -> ModuleType:
    """`qatscale.quant.triton_kernels`, interpreted. Skips where Triton is not installed.

    The interpreter's casts between bf16 and fp32 are repaired: it cuts off where a GPU rounds to even (PTX cvt.rn), and
    takes denormals for 0. Its fused product and sum rounds twice, where a GPU rounds once. And `tl.sum`, itself a
    kernel, is for the GPU where torch has imported Triton before.
    """
    pytest.importorskip("triton", reason=REASON)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
    try:
        from qatscale.quant import triton_kernels as kernels
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def exact_cast(builder, source, target):  # type: ignore[no-untyped-def]
        casts = source.dtype.scalar, target.scalar
        if casts == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)
        if casts == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return cast(builder, source, target)

    def create_fma(self, x, y, z):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma
    tl.sum = lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine)
    if cast.__name__ != "exact_cast":
        interpreter.InterpreterBuilder.cast_impl = exact_cast
    return kernels
