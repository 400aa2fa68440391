"""Question 2: the best size and bit width for a memory budget and tokens, over the shapes of `qatlaw.plan.shapes`.

The memory of the weights is

    the matrices of the blocks                     at B bits (2 for ternary weights)
    the embedding table                            at max(4, B) bits: it never has fewer than 4
    one scale per row or group of each of them     at 16 bits
    the norms                                      at 16 bits

or, for a format of exports, what its file holds. Activations and key-value cache are left out: they depend on how the
model is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qatlaw.bit_widths import EMBEDDING_LEAST_BITS, UNQUANTIZED_BITS
from qatlaw.fraction_laws import PAPER
from qatlaw.plan.run import Recipe, RunPlan, plan_run, width_warnings
from qatlaw.plan.shapes import DEEP, SHALLOW, VOCABULARY, FileSize, Shape, shapes_within
from qatlaw.plan.waste import optimal_loss
from qatlaw.planner_law import PlanLaw

SHAPES = (
    f"Llama-style shapes, {DEEP} to {SHALLOW} times as wide as deep, embedding and head tied. Memory counts weights"
)
RULE = (
    f"{SHAPES} alone: blocks at B bits, the embedding at max({EMBEDDING_LEAST_BITS}, B), norms and scales at "
    f"{UNQUANTIZED_BITS}."
)


@dataclass(frozen=True)
class MemoryRow:
    """The best model of one bit width, and its plan."""

    bits: float
    shape: Shape
    largest: Shape
    """The largest that fits. With few tokens per byte, `shape` can be a smaller one that is better by the law."""
    bytes: float
    """The memory of the weights, or the size of the file."""
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
    law: PlanLaw = PAPER,
    vocabulary: int = VOCABULARY,
    group_size: int | None = None,
    file_size: FileSize | None = None,
) -> MemoryPlan:
    """For each width the best model whose weights fit into `budget` bytes, with its split and its loss.

    The best is the largest; with a law, the one with the lowest predicted loss, which is nearly always the largest.
    group_size: input channels that share a scale; None: a row does. file_size: bytes in a format of exports.

    InputError where no model fits.
    """
    rows = []
    for bits in widths:
        fitting = shapes_within(budget, bits, vocabulary, group_size, file_size)
        shape = fitting[-1]
        law.check_bits(bits)
        if law.law is not None:
            losses = optimal_loss(law.law, [shape.params for shape in fitting], tokens, bits)
            shape = fitting[int(np.argmin(losses))]
        size = float(file_size(shape, bits) if file_size else shape.weights(bits, group_size).bytes)
        plan = replace(plan_run(Recipe(shape.params, tokens, group_size=group_size), bits, law), stored_bytes=size)
        rows.append(MemoryRow(bits, shape, fitting[-1], size, plan, 6.0 * shape.params * plan.tokens))
    best = 0 if len(rows) == 1 else None
    if law.law is not None:
        best = min(range(len(rows)), key=lambda i: rows[i].plan.loss or 0.0)
    return MemoryPlan(budget, round(tokens), tuple(rows), best, width_warnings([row.plan for row in rows]))
