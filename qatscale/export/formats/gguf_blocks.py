"""GGUF's quantized blocks, made from integers and their scale. ggml's own quantizers would choose other scales.

Layouts are those of llama.cpp's ggml-common.h. A block is 32, 128 or 256 neighbouring weights of a row with their fp16
scale d (= the scale of `QuantizedMatrix`). Sub-block scales, in types that have them, are constants:

=====  ==========================================  ========================
type   a weight is                                 so that integers are
=====  ==========================================  ========================
Q1_0   d · (2q - 1), q < 2                         ±1
TQ2_0  d · (q - 1), q < 4                          -1, 0, 1
Q2_K   d · sc · q - dmin · m, sc = 2, m = 3        2q - 3: ±1, ±3
Q3_K   d · (sc - 32) · (q - 4), sc = 33            -4 ... 3
Q4_0   d · (q - 8)                                 -8 ... 7
Q5_0   d · (q - 16)                                -16 ... 15
Q6_K   d · sc · (q - 32), sc = 1                   -32 ... 31
Q8_0   d · q                                       -128 ... 127
=====  ==========================================  ========================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qatscale.export.integers import integer_range
from qatscale.quant.bit_widths import Quantizer


@dataclass(frozen=True)
class BlockType:
    name: str
    low: int
    high: int
    """The integers it holds."""
    parts: Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
    """(integers - low as uint8 [blocks, weights], d as bytes [blocks, 2]) -> the bytes of blocks, [blocks, …] each."""

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        return GGMLQuantizationType[self.name]

    @property
    def weights(self) -> int:
        return GGML_QUANT_SIZES[self.ggml_type][0]

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return GGML_QUANT_SIZES[self.ggml_type][1]


def _nibbles(q: np.ndarray, run: int) -> np.ndarray:
    """`run` bytes for every 2·run codes: the first `run` in their low halves, the others in their high halves."""
    pair = (q & 0xF).reshape(len(q), -1, 2, run)
    return (pair[:, :, 0] | (pair[:, :, 1] << 4)).reshape(len(q), -1)


def _pairs(q: np.ndarray) -> np.ndarray:
    """2 bits each: of every 128 codes, number 32·i + j in bits 2·i of byte j."""
    four = (q & 3).reshape(len(q), -1, 4, 32)
    return (four[:, :, 0] | (four[:, :, 1] << 2) | (four[:, :, 2] << 4) | (four[:, :, 3] << 6)).reshape(len(q), -1)


def _bits(q: np.ndarray) -> np.ndarray:
    """1 bit each, the first in the lowest."""
    return np.packbits(q, axis=-1, bitorder="little")


def _third_bits(q: np.ndarray) -> np.ndarray:
    """Bit i of byte j: the third bit of number 32·i + j."""
    return _bits((q >> 2).reshape(len(q), 8, 32).transpose(0, 2, 1)).reshape(len(q), 32)


def _constant(like: np.ndarray, values: list[int]) -> np.ndarray:
    return np.tile(np.array(values, np.uint8), (len(like), 1))


Q1_0 = BlockType("Q1_0", -1, 1, lambda q, d: [d, _bits(q >> 1)])
TQ2_0 = BlockType("TQ2_0", -1, 1, lambda q, d: [_pairs(q), d])
Q2_K = BlockType("Q2_K", -3, 3, lambda q, d: [_constant(q, [2 | 3 << 4] * 16), _pairs(q >> 1), d, d])
Q3_K = BlockType("Q3_K", -4, 3, lambda q, d: [_third_bits(q), _pairs(q), _constant(q, [0x11] * 8 + [0xAA] * 4), d])
"""Its sixteen 6-bit scales are all 33 = 0b10_0001."""
Q4_0 = BlockType("Q4_0", -8, 7, lambda q, d: [d, _nibbles(q, 16)])
Q5_0 = BlockType("Q5_0", -16, 15, lambda q, d: [d, _bits(q >> 4), _nibbles(q, 16)])
Q6_K = BlockType("Q6_K", -32, 31, lambda q, d: [_nibbles(q, 64), _pairs(q >> 4), _constant(q, [1] * 16), d])
Q8_0 = BlockType("Q8_0", -128, 127, lambda q, d: [d, q ^ 0x80])


TYPES = (TQ2_0, Q2_K, Q3_K, Q4_0, Q5_0, Q6_K, Q8_0)


def block_types(quantizer: Quantizer) -> list[BlockType]:
    """The types that hold a quantizer's integers, best first: the smallest, and the smallest with blocks of 32, which
    divide rows that blocks of 256 do not."""
    low, high = integer_range(quantizer)
    fits = [one for one in TYPES if one.low <= low and high <= one.high]
    return list(dict.fromkeys((fits[0], next(one for one in fits if one.weights == 32))))


def to_blocks(block_type: BlockType, integers: np.ndarray, d: np.ndarray) -> np.ndarray:
    """integers: int8 [rows, in], d: float16 [rows, groups] -> uint8 [rows, bytes of a row]."""
    rows, channels = integers.shape
    assert block_type.low <= integers.min() and integers.max() <= block_type.high  # noqa: PT018 - one range
    count = channels // block_type.weights
    per_block = np.repeat(d.astype("<f2"), count // d.shape[1], axis=1).reshape(-1, 1).view(np.uint8)
    raised = (integers.reshape(-1, block_type.weights).astype(np.int16) - block_type.low).astype(np.uint8)
    blocks = np.hstack(block_type.parts(raised, per_block))
    assert blocks.shape == (rows * count, block_type.bytes)
    return blocks.reshape(rows, -1)
