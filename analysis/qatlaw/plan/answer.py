"""An answer of the planner: a table of text for people, plain data for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from qatlaw.default import PlannerLaw
from qatlaw.plan.request import Question

TRAIN = ("qatscale", "train", "RECIPE")


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column is words or a key, the others are numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Answer:
    question: Question
    title: str
    table: Table
    plan: Any
    """The dataclass, or a list of them, that the table shows."""
    law: PlannerLaw | None
    params: float
    """Of the model that is to be run: the planned one, or the one that was asked about."""
    notes: tuple[str, ...] = ()
    """Definitions and answers in words."""
    missing: str | None = None
    """What a loss law would add."""
    warnings: tuple[str, ...] = ()
    command: tuple[str, ...] = TRAIN
    overrides: tuple[str, ...] = ()
    """Empty where the answer is a choice that is still to be made."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: strict JSON, what is not finite is null."""
        law = None if self.law is None else {"source": self.law.source, "synthetic": self.law.synthetic}
        return {
            "question": self.question,
            "plan": _plain(self.plan),
            "law": law,
            "notes": list(self.notes),
            "missing": self.missing,
            "warnings": list(self.warnings),
            "overrides": list(self.overrides),
            "command": [*self.command, *self.overrides] if self.overrides else None,
        }


def _plain(value: Any) -> Any:
    """Dataclasses, with their properties, as objects."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        derived = [name for name, attribute in vars(kind).items() if isinstance(attribute, property)]
        return {name: _plain(getattr(value, name)) for name in [*(f.name for f in fields(value)), *derived]}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
