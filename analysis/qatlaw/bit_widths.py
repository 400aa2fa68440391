"""The bit widths that a weight can be quantized to. Every list, text and table of them derives from this module."""

from __future__ import annotations

BIT_WIDTHS: tuple[int | float, ...] = (1, 1.58, 2, 3, 4, 5, 6, 8)
"""Bits per weight; 1.58 is ternary. CONTRIBUTING.md lists what a new one takes."""
BIT_WIDTHS_TEXT = ", ".join(f"{bits:g}" for bits in BIT_WIDTHS)
EMBEDDING_LEAST_BITS = 4
"""Embedding and head are quantized to no fewer bits."""
UNQUANTIZED_BITS = 16
"""Bits of a weight in full precision, as bf16 holds it."""
EMBEDDING_BITS: tuple[int, ...] = (
    *(int(bits) for bits in BIT_WIDTHS if bits >= EMBEDDING_LEAST_BITS), UNQUANTIZED_BITS,
)  # fmt: skip
"""Bits that embedding and head can have."""
TOLERANCE = 0.01
"""Nats per token that a bit width may lose, against full precision: about 1 % of the perplexity."""


def bits_label(bits: float) -> str:
    return f"{bits:g} bit" if bits == 1 else f"{bits:g} bits"
