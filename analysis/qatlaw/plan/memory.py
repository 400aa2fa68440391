"""Question 2: a memory budget and tokens to the best size and bit width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qatlaw.plan.run import RunPlan, plan_run
from qatlaw.plan.shapes import VOCABULARY, Shape, shapes_within
from qatlaw.plan.waste import optimal_loss
from qatlaw.planner_law import PlannerLaw


@dataclass(frozen=True)
class MemoryRow:
    """The best model of one bit width, and its plan."""

    bits: float
    shape: Shape
    largest: Shape
    """That fits. With so few tokens per byte that a smaller model is better by the law, `shape` is that one."""
    bytes: float
    """Of its weights."""
    plan: RunPlan
    flops: float
    """Of its training, 6 N D: at the same tokens a larger model costs more."""

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
    """Index of the row with the lowest predicted loss; None without a law, but for a single width."""

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"{row.bits:g} bits: {warning}" for row in self.rows for warning in row.plan.warnings)


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
    The rule behind size and memory is told in `qatlaw.plan.shapes`. InputError where no model fits.
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
        rows.append(MemoryRow(bits, shape, fitting[-1], shape.bytes(bits), plan, 6.0 * shape.params * plan.tokens))
    if law is None:
        best = 0 if len(rows) == 1 else None
    else:
        predicted = [row.plan.prediction.loss for row in rows if row.plan.prediction]
        best = predicted.index(min(predicted))
    return MemoryPlan(budget, round(tokens), tuple(rows), best)
