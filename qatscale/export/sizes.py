"""Bytes of a planned model in the formats of exports, without torch, so that the planner answers at once.

A test compares them with the encodings of `qatscale.export.formats`, which decide what an export writes.
"""

from __future__ import annotations

from qatlaw.bit_widths import EMBEDDING_LEAST_BITS
from qatlaw.plan.shapes import Shape
from qatscale.export.integers import MLX_GROUPS, mlx_bits, packed_words, signed_bits
from qatscale.quant.bit_widths import get_quantizer


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
    plain, quantizer = 2 * rows * columns, get_quantizer(bits)
    match format:
        case "compressed-tensors":
            packed = 4 * rows * packed_words(columns, signed_bits(quantizer))
            return packed + 2 * rows * (columns // group) + 16  # scales in bf16, and the shape
        case "gguf":
            from qatscale.export.formats.gguf_blocks import block_types

            sizes = ((one.weights, one.bytes) for one in block_types(quantizer))
            return next((size * rows * columns // n for n, size in sizes if columns % n == group % n == 0), plain)
        case "mlx":
            scales = next((8 * rows * columns // n for n in MLX_GROUPS if columns % n == group % n == 0), None)
            return plain if scales is None else 4 * rows * packed_words(columns, mlx_bits(quantizer)) + scales
    return plain
