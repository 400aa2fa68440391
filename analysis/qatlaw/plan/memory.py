"""Question 2: the best size and bit width for a memory budget and tokens, over real shapes of models.

The rule: a Llama-style decoder without biases, embedding and head tied, a SwiGLU of 2.7 times the width, widths in
multiples of 128, and a width of 56 to 100 times the depth, as in the recipes of qatscale. The memory of the weights is

    the matrices of the blocks          at B bits (2 for ternary weights)
    the embedding table                 at max(4, B) bits: it never has fewer than 4
    one scale per row of each of them   at 16 bits
    the norms                           at 16 bits

without activations and key-value cache, which depend on how the model is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qatlaw.bit_widths import EMBEDDING_LEAST_BITS, UNQUANTIZED_BITS
from qatlaw.effective_bits import StoredWeights, llama_weights
from qatlaw.errors import InputError
from qatlaw.plan.run import RunPlan, plan_run, width_warnings
from qatlaw.plan.waste import optimal_loss
from qatlaw.planner_law import PlannerLaw

VOCABULARY = 32_000
"""Rows of the embedding: Llama 2's."""
WIDTH_STEP = 128
WIDEST = 32_768
MLP = 2.7
"""Width of the SwiGLU over that of the model, rounded to a multiple of 128."""
SHALLOW, DEEP = 100, 56
"""Most and least width over depth."""
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
    def params(self) -> int:
        """N: all parameters, the tied table once, without scales."""
        return int(self.weights(1).params)

    def weights(self, bits: float) -> StoredWeights:
        return _weights(np.array(self.hidden_size), np.array(self.layers), self.vocabulary, bits)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Heads have 128 channels from a width of 1536 on, else 64."""
        return (
            f"model.vocab_size={self.vocabulary}",
            f"model.hidden_size={self.hidden_size}",
            f"model.layers={self.layers}",
            f"model.heads={self.hidden_size // (128 if self.hidden_size >= 1536 else 64)}",
            "model.kv_heads=null",
            f"model.intermediate_size={int(_intermediate(np.array(self.hidden_size)))}",
            "model.tied_embedding=true",
        )


@dataclass(frozen=True)
class MemoryRow:
    """The best model of one bit width, and its plan."""

    bits: float
    shape: Shape
    largest: Shape
    """The largest that fits. With few tokens per byte, `shape` can be a smaller one that is better by the law."""
    bytes: float
    plan: RunPlan
    flops: float
    """FLOPs of its training, 6 N D: at the same tokens a larger model costs more."""

    @property
    def megabytes(self) -> float:
        return self.bytes / 1e6


@dataclass(frozen=True)
class MemoryPlan:
    budget: float
    """Bytes."""
    tokens: int
    rows: tuple[MemoryRow, ...]
    best: int | None
    """Index of the row with the lowest predicted loss; without a law None, except for a single width."""
    warnings: tuple[str, ...]


def plan_memory(
    budget: float,
    tokens: float,
    widths: Sequence[float],
    *,
    law: PlannerLaw | None = None,
    vocabulary: int = VOCABULARY,
) -> MemoryPlan:
    """For each width the best model whose weights fit into `budget` bytes, with its split and its loss.

    The best is the largest; with a law, the one with the lowest predicted loss, which is nearly always the largest.
    InputError where no model fits.
    """
    rows = []
    for bits in widths:
        fitting = shapes_within(budget, bits, vocabulary)
        shape = fitting[-1]
        if law is not None:
            law.check_bits(bits)
            losses = optimal_loss(law.law, [shape.params for shape in fitting], tokens, bits)
            shape = fitting[int(np.argmin(losses))]
        plan = plan_run(shape.params, tokens, bits, law=law)
        size = float(shape.weights(bits).bytes)
        rows.append(MemoryRow(bits, shape, fitting[-1], size, plan, 6.0 * shape.params * plan.tokens))
    best = 0 if len(rows) == 1 else None
    if law is not None:
        best = min(range(len(rows)), key=lambda i: rows[i].plan.loss or 0.0)
    return MemoryPlan(budget, round(tokens), tuple(rows), best, width_warnings([row.plan for row in rows]))


def shapes_within(budget: float, bits: float, vocabulary: int = VOCABULARY) -> list[Shape]:
    """The usual shapes whose weights fit into `budget` bytes at `bits` bits, by rising number of parameters.

    InputError where not even the smallest one fits, and where the largest one does not fill the budget.
    """
    pairs = [
        (width, layers)
        for width in range(WIDTH_STEP, WIDEST + 1, WIDTH_STEP)
        for layers in range(-(-width // SHALLOW), width // DEEP + 1)
    ]
    widths, layers = np.array(pairs, np.int64).T
    weights = _weights(widths, layers, vocabulary, bits)
    params, sizes = weights.params, weights.bytes
    fits = sizes <= budget
    if not fits.any() or fits.all():
        ends = f"{sizes.min() / 1e6:.3g}MB to {sizes.max() / 1e9:.3g}GB"
        problem = f"Llama-style models with a vocabulary of {vocabulary} take {ends} at {bits:g} bits."
        raise InputError("BYTES", f"{budget / 1e6:g}MB", problem)
    order = np.flatnonzero(fits)[np.argsort(params[fits], kind="stable")]
    return [Shape(int(widths[i]), int(layers[i]), vocabulary) for i in order]


def _intermediate(width: Integers) -> Integers:
    return (np.rint(MLP * width / WIDTH_STEP) * WIDTH_STEP).astype(np.int64)


def _weights(width: Integers, layers: Integers, vocabulary: int, bits: float) -> StoredWeights:
    return llama_weights(
        hidden_size=width, layers=layers, intermediate_size=_intermediate(width), vocabulary=vocabulary, bits=bits
    )
