"""Usual shapes of Llama-style models: what the planner stands in for a model of which only the size is known.

The rule: no biases, embedding and head tied, a SwiGLU of 2.7 times the width, widths in multiples of 128, and a width
of 56 to 100 times the depth, as in the recipes of qatscale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qatlaw.amounts import bytes_label
from qatlaw.bit_widths import bits_label
from qatlaw.effective_bits import StoredWeights, llama_weights
from qatlaw.errors import InputError
from qatlaw.laws.nominal import EffectiveBits

VOCABULARY = 32_000
"""Rows of the embedding: Llama 2's."""
WIDTH_STEP = 128
WIDEST = 32_768
MLP = 2.7
"""Width of the SwiGLU over that of the model, rounded to a multiple of 128."""
SHALLOW, DEEP = 100, 56
"""Most and least width over depth."""
NEAR = 0.15
"""A usual shape stands in for a size that differs from its own by this share at most."""

Integers = NDArray[np.int64]


FileSize = Callable[["Shape", float], float]
"""(shape, bits) -> bytes of a file's tensors."""


@dataclass(frozen=True)
class Shape:
    """A model's shape."""

    hidden_size: int
    layers: int
    vocabulary: int

    @property
    def intermediate_size(self) -> int:
        return int(_intermediate(np.array(self.hidden_size)))

    @property
    def params(self) -> int:
        """N: all parameters, the tied table once, without scales."""
        return int(self.weights(1).params)

    def weights(self, bits: float, group_size: int | None = None) -> StoredWeights:
        return _weights(np.array(self.hidden_size), np.array(self.layers), self.vocabulary, bits, group_size)

    def __str__(self) -> str:
        return f"{self.hidden_size:,} wide, {self.layers} deep, {self.vocabulary:,} tokens"

    @property
    def overrides(self) -> tuple[str, ...]:
        """Heads have 128 channels from a width of 1536 on, else 64."""
        return (
            f"model.vocab_size={self.vocabulary}",
            f"model.hidden_size={self.hidden_size}",
            f"model.layers={self.layers}",
            f"model.heads={self.hidden_size // (128 if self.hidden_size >= 1536 else 64)}",
            "model.kv_heads=null",
            f"model.intermediate_size={self.intermediate_size}",
            "model.tied_embedding=true",
        )


def shapes_within(
    budget: float,
    bits: float,
    vocabulary: int = VOCABULARY,
    group_size: int | None = None,
    file_size: FileSize | None = None,
) -> list[Shape]:
    """The usual shapes whose weights fit into `budget` bytes at `bits` bits, by rising number of parameters.

    file_size: bytes in a format; None: those of `Shape.weights`.

    InputError where not even the smallest one fits, and where the largest one does not fill the budget.
    """
    widths, layers = _usual()
    weights = _weights(widths, layers, vocabulary, bits, group_size)
    params, sizes = weights.params, weights.bytes
    if file_size is not None:
        sizes = file_bytes(widths, layers, vocabulary, bits, file_size)
    fits = sizes <= budget
    if not fits.any() or fits.all():
        ends = f"{bytes_label(sizes.min())} to {bytes_label(sizes.max())}"
        problem = f"Llama-style models with a vocabulary of {vocabulary} take {ends} at {bits_label(bits)}."
        raise InputError("BYTES", bytes_label(budget), problem)
    order = np.flatnonzero(fits)[np.argsort(params[fits], kind="stable")]
    return [Shape(int(widths[i]), int(layers[i]), vocabulary) for i in order]


def file_bytes(
    widths: Integers, layers: Integers, vocabulary: int, bits: float, file_size: FileSize
) -> NDArray[np.float64]:
    """All blocks of a model are stored alike, so two depths of each width are enough."""
    unique, index = np.unique(widths, return_inverse=True)
    one, two = (np.array([file_size(Shape(int(width), n, vocabulary), bits) for width in unique]) for n in (1, 2))
    return one[index] + (layers - 1) * (two - one)[index]


def nearest_shape(params: float) -> Shape | None:
    """The usual shape of about so many parameters; None where none is near."""
    widths, layers = _usual()
    off = np.abs(np.log(_weights(widths, layers, VOCABULARY, 1).params / params))
    best = int(np.argmin(off))
    return Shape(int(widths[best]), int(layers[best]), VOCABULARY) if off[best] < NEAR else None


def usual_effective_bits(vocabulary: int = VOCABULARY, group_size: int | None = None) -> EffectiveBits:
    """(N, nominal bits) -> effective bits of the usual shape of about N parameters. InputError where none is near."""
    widths, layers = _usual()
    order = np.argsort(_weights(widths, layers, vocabulary, 1).params)
    widths, layers = widths[order], layers[order]
    sizes = np.log(_weights(widths, layers, vocabulary, 1).params)

    def effective(N: ArrayLike, B: ArrayLike) -> NDArray[np.float64]:
        logs, bits = np.broadcast_arrays(np.log(np.asarray(N, np.float64)), np.asarray(B, np.float64))
        above = np.clip(np.searchsorted(sizes, logs), 1, len(sizes) - 1)
        near = above - (logs - sizes[above - 1] < sizes[above] - logs)
        off = np.abs(sizes[near] - logs)
        if off.min() > NEAR:  # of many sizes that are compared, some may lie outside
            problem = "no usual shape has about so many parameters, so that its effective bits are not known."
            raise InputError("--params", float(np.asarray(N).flat[0]), problem, "Give a --recipe.")
        stored = np.empty(logs.shape)
        for width in np.unique(bits):
            at = near[bits == width]
            stored[bits == width] = _weights(widths[at], layers[at], vocabulary, width, group_size).effective_bits
        return stored

    return effective


def check_group_size(group_size: int | None) -> None:
    """InputError for groups that do not divide the widths of usual shapes."""
    if group_size and WIDTH_STEP % group_size:
        problem = f"does not divide {WIDTH_STEP}, of which the widths here are multiples."
        raise InputError("--group-size", group_size, problem, "Give 32, 64 or 128, or name a --recipe.")


def _usual() -> tuple[Integers, Integers]:
    """(widths, layers) of all usual shapes."""
    pairs = [
        (width, layers)
        for width in range(WIDTH_STEP, WIDEST + 1, WIDTH_STEP)
        for layers in range(-(-width // SHALLOW), width // DEEP + 1)
    ]
    widths, layers = np.array(pairs, np.int64).T
    return widths, layers


def _intermediate(width: Integers) -> Integers:
    return (np.rint(MLP * width / WIDTH_STEP) * WIDTH_STEP).astype(np.int64)


def _weights(
    width: Integers, layers: Integers, vocabulary: int, bits: float, group_size: int | None = None
) -> StoredWeights:
    return llama_weights(
        hidden_size=width, layers=layers, intermediate_size=_intermediate(width), vocabulary=vocabulary, bits=bits,
        group_size=group_size,
    )  # fmt: skip
