"""Integers packed into as few bits as they need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Integers spread into bits at a time; each bit takes a byte meanwhile."""


def packed_words(count: int, bits: int) -> int:
    """32-bit words of a packed row."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """values: [rows, n] of any integer type, of which the lowest `bits` bits count -> int32 [rows, words].

    Integer i takes the bits from i·bits on, the lowest first, and may cross two words. The rest of a row's last word is
    0. compressed-tensors' pack-quantized and MLX's affine weights are both this stream of bits.
    """
    rows, count = values.shape
    out = torch.empty(rows, packed_words(count, bits), dtype=torch.int32)
    step = max(1, _CHUNK // count)
    for first in range(0, rows, step):
        part = values[first : first + step].to(torch.uint8).numpy()
        spread = np.unpackbits(part[..., None], axis=-1, count=bits, bitorder="little").reshape(len(part), -1)
        spread = np.pad(spread, ((0, 0), (0, 32 * out.shape[1] - spread.shape[1])))
        packed = np.packbits(spread, axis=-1, bitorder="little").view("<i4")
        out[first : first + step] = torch.from_numpy(packed.astype(np.int32, copy=False))
    return out
