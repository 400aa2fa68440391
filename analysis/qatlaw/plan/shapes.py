"""Real shapes of models, and the memory their weights take when they are quantized.

The rule: a Llama-style decoder without biases, embedding and head tied, a SwiGLU of 2.7 times the width, widths in
multiples of 128, and a width of 56 to 100 times the depth, which is where the recipes of qatscale lie. In a memory
budget count

    the matrices of the blocks          at B bits
    the embedding table                 at max(4, B) bits: it never goes below 4
    one scale per row of each of them   at 16 bits
    the norms                           at 16 bits

and nothing else: no activations and no key-value cache, which depend on how the model is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qatlaw.bit_widths import EMBEDDING_LEAST_BITS, UNQUANTIZED_BITS
from qatlaw.errors import InputError

VOCABULARY = 32_000
"""Rows of the embedding: Llama 2's."""
WIDTH_STEP = 128
WIDEST = 32_768
MLP = 2.7
"""Width of the SwiGLU over that of the model, rounded to a multiple of 128."""
SHALLOW, DEEP = 100, 56
"""Width over depth, at most and at least."""
RULE = (
    f"Llama-style shapes, {DEEP} to {SHALLOW} times as wide as deep, embedding and head tied. Memory counts weights "
    f"alone: blocks at B bits, the embedding at max({EMBEDDING_LEAST_BITS}, B), norms and a scale a row at "
    f"{UNQUANTIZED_BITS}."
)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """A model's shape."""

    hidden_size: int
    layers: int
    vocabulary: int

    @property
    def intermediate(self) -> int:
        """Width of the gate and up projections."""
        return int(_intermediate(np.array(self.hidden_size)))

    @property
    def heads(self) -> int:
        """Of 128 channels from a width of 1536 on, else of 64."""
        return self.hidden_size // (128 if self.hidden_size >= 1536 else 64)

    @property
    def params(self) -> int:
        """N: all parameters, the tied table once, without scales."""
        return int(_params(np.array(self.hidden_size), np.array(self.layers), self.vocabulary))

    def bytes(self, bits: float) -> float:
        """Of its quantized weights with all that belongs to them."""
        return float(_bytes(np.array(self.hidden_size), np.array(self.layers), self.vocabulary, bits))

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            f"model.vocab_size={self.vocabulary}",
            f"model.hidden_size={self.hidden_size}",
            f"model.layers={self.layers}",
            f"model.heads={self.heads}",
            "model.kv_heads=null",
            f"model.intermediate_size={self.intermediate}",
            "model.tied_embedding=true",
        )


def shapes_within(budget: float, bits: float, vocabulary: int = VOCABULARY) -> list[Shape]:
    """The usual shapes whose weights fit into `budget` bytes at `bits` bits, by rising number of parameters.

    InputError where not even the smallest one fits, and where the largest one does not fill the budget.
    """
    widths, layers = _all_shapes()
    sizes = _bytes(widths, layers, vocabulary, bits)
    fits = sizes <= budget
    if not fits.any() or fits.all():
        least, most = sizes.min(), sizes.max()
        raise InputError(
            "BYTES",
            f"{budget / 1e6:g}MB",
            f"models of Llama's shape with {vocabulary} tokens of vocabulary take {least / 1e6:.3g}MB to "
            f"{most / 1e9:.3g}GB at {bits:g} bits.",
        )
    order = np.argsort(_params(widths[fits], layers[fits], vocabulary), kind="stable")
    return [Shape(int(w), int(n), vocabulary) for w, n in zip(widths[fits][order], layers[fits][order], strict=True)]


@lru_cache
def _all_shapes() -> tuple[Integers, Integers]:
    """Widths and depths of all shapes, [shapes] each."""
    pairs = [
        (width, layers)
        for width in range(WIDTH_STEP, WIDEST + 1, WIDTH_STEP)
        for layers in range(-(-width // SHALLOW), width // DEEP + 1)
    ]
    widths, layers = np.array(pairs, np.int64).T
    return widths, layers


def _intermediate(width: Integers) -> Integers:
    return (np.rint(MLP * width / WIDTH_STEP) * WIDTH_STEP).astype(np.int64)


def _matrices(width: Integers, layers: Integers) -> Integers:
    """Weights of q, k, v, o, gate, up and down."""
    return layers * (4 * width * width + 3 * width * _intermediate(width))


def _norms(width: Integers, layers: Integers) -> Integers:
    return (2 * layers + 1) * width


def _params(width: Integers, layers: Integers, vocabulary: int) -> Integers:
    return _matrices(width, layers) + vocabulary * width + _norms(width, layers)


def _bytes(width: Integers, layers: Integers, vocabulary: int, bits: float) -> NDArray[np.float64]:
    scales = layers * (5 * width + 2 * _intermediate(width)) + vocabulary
    quantized = _matrices(width, layers) * bits + vocabulary * width * max(EMBEDDING_LEAST_BITS, bits)
    return (quantized + UNQUANTIZED_BITS * (scales + _norms(width, layers))) / 8
