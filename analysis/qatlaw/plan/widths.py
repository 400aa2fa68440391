"""Question 3: QAT at each bit width against full precision, for one size and the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qatlaw.plan.run import SEQUENTIAL, RunPlan, Scheme, plan_run
from qatlaw.planner_law import PlannerLaw

TOLERANCE = 0.01
"""Nats per token: about 1 % of the perplexity."""


@dataclass(frozen=True)
class WidthRow:
    bits: float
    plan: RunPlan
    gap: float | None
    """Predicted loss less that of the full-precision run, in nats per token; None without a law."""


@dataclass(frozen=True)
class Comparison:
    params: int
    tokens: int
    full_precision_loss: float | None
    rows: tuple[WidthRow, ...]
    tolerance: float
    smallest: int | None
    """Index of the smallest width whose gap is within the tolerance; None where none is, or without a law."""

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"{row.bits:g} bits: {warning}" for row in self.rows for warning in row.plan.warnings)


def compare_widths(
    params: float,
    tokens: float,
    widths: Sequence[float],
    *,
    law: PlannerLaw | None = None,
    tolerance: float = TOLERANCE,
    tokens_per_step: int | None = None,
    scheme: Scheme = SEQUENTIAL,
) -> Comparison:
    """QAT at its optimal fraction, at each of `widths`, against a full-precision run of the same tokens.

    Or at the nearest fraction that `scheme` holds.
    """
    rows = []
    for bits in widths:
        plan = plan_run(params, tokens, bits, law=law, tokens_per_step=tokens_per_step, scheme=scheme)
        gap = plan.prediction.loss - plan.prediction.full_precision_loss if plan.prediction else None
        rows.append(WidthRow(bits, plan, gap))
    within = [i for i, row in enumerate(rows) if row.gap is not None and row.gap <= tolerance]
    predicted = [row.plan.prediction for row in rows]
    return Comparison(
        params=round(params),
        tokens=round(tokens),
        full_precision_loss=predicted[0].full_precision_loss if predicted[0] else None,
        rows=tuple(rows),
        tolerance=tolerance,
        smallest=min(within, key=lambda i: rows[i].bits, default=None),
    )
