"""Bits and bytes that a model's weights take when they are stored.

A nominal bit width B counts the matrices of the blocks alone. Embedding and head have bits of their own, every row or
group of a quantized matrix has a scale, and norms are not quantized:

    effective bits = sum over parts of (weights x bits + scales x bits of a scale) / N,    N = all weights, no scales

Numbers are floats, integers, or NumPy arrays of one shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qatlaw.bit_widths import EMBEDDING_LEAST_BITS, UNQUANTIZED_BITS, bits_label

Number = Any
"""A number, or an array for many models."""


@dataclass(frozen=True)
class Part:
    """Weights that are stored alike."""

    weights: Number
    bits: float
    scales: Number = 0
    """0: not quantized."""
    scale_bits: float = UNQUANTIZED_BITS

    @property
    def stored_bits(self) -> Number:
        """A code takes an integer number of bits: 2 where it is ternary, as in every format of exports."""
        return self.weights * math.ceil(self.bits) + self.scales * self.scale_bits


@dataclass(frozen=True)
class StoredWeights:
    matrices: Part
    """q, k, v, o, gate, up and down of all blocks."""
    embedding: Part
    """The embedding table, and the head where it is a table of its own."""
    norms: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.matrices, self.embedding, self.norms

    @property
    def params(self) -> Number:
        """N: all weights, a tied table once, without scales."""
        return sum(part.weights for part in self.parts)

    @property
    def bytes(self) -> Number:
        return sum(part.stored_bits for part in self.parts) / 8

    @property
    def effective_bits(self) -> Number:
        """Stored bits per parameter, scales included."""
        return 8 * self.bytes / self.params

    @property
    def quantized(self) -> dict[float, tuple[Number, Number]]:
        """Bits, ascending -> (weights, scales) of what is quantized to them."""
        by_bits: dict[float, tuple[Number, Number]] = {}
        for part in self.parts[:2]:
            if np.any(part.scales):
                weights, scales = by_bits.get(part.bits, (0, 0))
                by_bits[part.bits] = weights + part.weights, scales + part.scales
        return dict(sorted(by_bits.items()))

    @property
    def shares(self) -> dict[float, float]:
        """Bits -> share of the parameters that is quantized to them."""
        return {bits: float(weights / self.params) for bits, (weights, _) in self.quantized.items()}

    @property
    def shares_text(self) -> str:
        """`61.7 % at 1 bit, 38.0 % at 4 bits, 0.3 % not quantized`."""
        texts = [f"{share:.1%} at {bits_label(bits)}" for bits, share in self.shares.items()]
        return ", ".join([*texts, f"{1 - sum(self.shares.values()):.1%} not quantized"])

    def text(self, nominal: float) -> str:
        """The shares, and the bits beside the nominal ones."""
        bits = f"{nominal:g} nominal, {self.effective_bits:.3f} effective with scales and norms"
        return f"{self.shares_text}; bits a parameter: {bits}; {self.bytes / 1e6:,.4g} MB"


def attention_shape(
    hidden_size: Number,
    heads: Number,
    kv_heads: Number | None = None,
    head_dim: Number | None = None,
    attention_bias: bool = False,
    qk_norm: bool = False,
) -> dict[str, Number]:
    """What the keys of a recipe's model say of its attention, as `llama_weights` takes it."""
    kv_heads, channels = kv_heads or heads, head_dim or hidden_size / heads
    biases = channels * (heads + 2 * kv_heads) if attention_bias else 0
    return {
        "kv_width": channels * kv_heads,
        "attention_width": channels * heads,
        "block_vectors": biases + (2 * channels if qk_norm else 0),
    }


def llama_weights(
    *,
    hidden_size: Number,
    layers: Number,
    intermediate_size: Number,
    vocabulary: Number,
    bits: float,
    kv_width: Number = None,
    attention_width: Number = None,
    block_vectors: Number = 0,
    tied: bool = True,
    embedding_bits: float | None = None,
    group_size: int | None = None,
    plain_bits: float = UNQUANTIZED_BITS,
) -> StoredWeights:
    """The weights of a Llama at `bits` bits; from 16 bits on, it is not quantized.

    kv_width: channels of the keys, and of the values; None: hidden_size. attention_width: of the queries; None:
    hidden_size. block_vectors: elements of a block's biases and norms of heads, beside its two norms.
    embedding_bits: None: max(4, bits) where head and embedding are tied, else not quantized. group_size: input channels
    that share a scale; None: a row does. plain_bits: of a scale, a norm and an unquantized weight: 16, or 32 after
    training in fp32.
    """
    kv_width = hidden_size if kv_width is None else kv_width
    attention_width = hidden_size if attention_width is None else attention_width
    tables = 1 if tied else 2
    if embedding_bits is None:
        embedding_bits = max(EMBEDDING_LEAST_BITS, bits) if tied else UNQUANTIZED_BITS

    def part(weights: Number, rows: Number, bits: float) -> Part:
        if bits >= UNQUANTIZED_BITS:
            return Part(weights, plain_bits)
        return Part(weights, bits, rows if group_size is None else weights // group_size, plain_bits)

    attention = 2 * hidden_size * attention_width + 2 * hidden_size * kv_width
    rows = attention_width + 2 * hidden_size + 2 * kv_width + 2 * intermediate_size  # q; o, down; k, v; gate, up
    return StoredWeights(
        matrices=part(layers * (attention + 3 * hidden_size * intermediate_size), layers * rows, bits),
        embedding=part(tables * vocabulary * hidden_size, tables * vocabulary, embedding_bits),
        norms=Part((2 * layers + 1) * hidden_size + layers * block_vectors, plain_bits),
    )
