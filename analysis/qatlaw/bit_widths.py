"""Bit widths of quantized weights, for the planner, recipes and quantizers alike."""

from __future__ import annotations

BIT_WIDTHS: tuple[int | float, ...] = (1, 1.58, 2, 3, 4, 5, 6, 8)
"""Bits per weight that a run can train at; 1.58 is ternary. `qatscale.quant.bit_widths` has a quantizer for each."""
EMBEDDING_LEAST_BITS = 4
"""Automatic bits of embedding and head never go below this."""
UNQUANTIZED_BITS = 16
"""Of weights that are not quantized, as bf16 holds them."""
