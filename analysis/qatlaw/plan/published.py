"""Question 3 by a published law: QAT from scratch at each bit width against full precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qatlaw.errors import InputError
from qatlaw.fraction import tokens_per_parameter_byte
from qatlaw.laws.named import NamedLaw
from qatlaw.plan.answer import Answer, columns
from qatlaw.plan.run import Comparison, Recipe

NOTE = "The law contains no QAT fraction: every token is a QAT token. Its N has neither embedding nor head."


@dataclass(frozen=True)
class ScratchRow:
    bits: float
    S: float
    loss: float
    gap: float | None
    """Over the law's full precision; None where it describes none."""


def published_answer(law: NamedLaw, run: Recipe, title: str, nats: float) -> Answer:
    """nats: the gap to full precision that is called small.

    InputError where the law needs a group and none is known.
    """
    if law.needs_group and run.group is None:
        fix = "Add the weights that share a scale; with a scale a row, the model's width."
        raise InputError("--group-size", None, f"is missing: {law.name} depends on it.", fix)
    N, D = run.size
    asked = law.asked(run.non_embedding or N, D, law.widths, run.group or math.nan)
    losses, full = law.loss(asked).tolist(), float(law.loss(asked.in_full_precision)[0])
    rows = tuple(
        ScratchRow(bits, tokens_per_parameter_byte(N, D, bits), loss, loss - full if math.isfinite(full) else None)
        for bits, loss in zip(law.widths, losses, strict=True)
    )
    small = [i for i, row in enumerate(rows) if row.gap is not None and row.gap <= nats]
    outside = law.outside(asked)
    unknown = None if run.non_embedding else "--params is taken for the law's N, which has neither embedding nor head"
    known, warnings = full if math.isfinite(full) else None, tuple(line for line in (outside, unknown) if line)
    plan = Comparison(
        params=round(N), tokens=round(D), full_precision_loss=known, rows=rows,
        tolerance=nats, smallest=min(small, default=None), warnings=warnings,
    )  # fmt: skip
    best = None if plan.smallest is None else rows[plan.smallest]
    notes = [f"It answers: {law.answers}.", NOTE]
    if plan.full_precision_loss is not None:
        within = f"within {nats:g} nats of full precision, whose predicted loss is {full:.4f}."
        notes.insert(0, f"* the smallest bit width {within}" if best else f"No bit width is {within}")
    table = columns(rows, "bits S loss gap", best)
    title += f": QAT from scratch by {law.label}"
    return Answer("bit-widths", title, table, plan, law, notes, plan.warnings, (), plan.params)
