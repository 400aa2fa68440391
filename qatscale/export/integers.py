"""The integers of a quantized matrix, which formats store with a scale. No torch: the planner counts files by them."""

from __future__ import annotations

from qatscale.quant.bit_widths import Quantizer

MLX_BITS = (1, 2, 3, 4, 5, 6, 8)
MLX_GROUPS = (128, 64, 32)
"""Codes that share a scale in MLX, the cheapest first."""


def integer_range(quantizer: Quantizer) -> tuple[int, int]:
    """The lowest and the highest integer."""
    return (1 - 2 * quantizer.qn, 1 + 2 * quantizer.qp) if quantizer.name == "seq" else (-quantizer.qn, quantizer.qp)


def integer_step(quantizer: Quantizer) -> int:
    """Distance of neighbouring integers: 2 where only odd ones occur."""
    return 2 if quantizer.name in ("binary", "seq") else 1


def signed_bits(quantizer: Quantizer) -> int:
    """Bits of a two's complement number that holds every integer."""
    low, high = integer_range(quantizer)
    return max(-low - 1, high).bit_length() + 1


def mlx_bits(quantizer: Quantizer) -> int:
    """Bits of a code in MLX."""
    return next(bits for bits in MLX_BITS if bits >= quantizer.storage_bits)


def packed_words(count: int, bits: int) -> int:
    """32-bit words of a packed row."""
    return -(-count * bits // 32)
