"""Bytes of a planned model in the formats of exports, without torch, so that the planner answers at once.

A test compares them with the encodings of `qatscale.export.formats`, which decide what an export writes.
"""

from __future__ import annotations

from qatlaw.bit_widths import EMBEDDING_LEAST_BITS
from qatlaw.plan.shapes import Shape

_Q4_0 = (32, 18)
_GGUF = {
    1: ((256, 66), _Q4_0), 1.58: ((256, 66), _Q4_0), 2: ((256, 84), _Q4_0), 3: ((256, 110), _Q4_0), 4: (_Q4_0,),
    5: ((32, 22),), 6: ((256, 210), (32, 34)), 8: ((32, 34),),
}  # fmt: skip
"""Bits -> (weights, bytes) of a block, best first."""
_SIGNED = {1: 2, 1.58: 2, 2: 3}
"""Bits of compressed-tensors' integers where they are not the weights'."""
_MLX_GROUPS = (128, 64, 32)


def tensor_bytes(format: str, shape: Shape, bits: float, group_size: int | None) -> int:
    """All tensors of a bf16 model at `bits` bits, its tied embedding at no fewer than 4."""
    width, inner = shape.hidden_size, shape.intermediate_size
    blocks = 4 * _matrix(format, width, width, bits, group_size)
    blocks += 2 * _matrix(format, inner, width, bits, group_size) + _matrix(format, width, inner, bits, group_size)
    norm = width * (4 if format in ("gguf", "mlx") else 2)
    table_bits = max(EMBEDDING_LEAST_BITS, bits)
    packed_table = format in ("gguf", "mlx")  # clients unpack no embedding elsewhere
    table = _matrix(format if packed_table else "hf", shape.vocabulary, width, table_bits, group_size)
    return shape.layers * (blocks + 2 * norm) + table + norm


def _matrix(format: str, rows: int, columns: int, bits: float, group_size: int | None) -> int:
    group = group_size or columns
    plain = 2 * rows * columns
    match format:
        case "compressed-tensors":
            packed = 4 * rows * _words(columns, _SIGNED.get(bits, round(bits)))
            return packed + 2 * rows * (columns // group) + 16  # scales in bf16, and the shape
        case "gguf":
            fitting = (size * (rows * columns // n) for n, size in _GGUF[bits] if columns % n == group % n == 0)
            return next(fitting, plain)
        case "mlx":
            stored = 2 if bits == 1.58 else round(bits)
            fitting = (8 * rows * (columns // n) for n in _MLX_GROUPS if columns % n == group % n == 0)
            scales = next(fitting, None)
            return plain if scales is None else 4 * rows * _words(columns, stored) + scales
    return plain


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)
