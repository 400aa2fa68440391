"""Numbers that a finished run is known by: perplexity, and speeds as medians over its metrics records."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import Any

LEAST_STEPS = 50
"""Steps that a speed of record is the median of, at least."""


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is more than a float holds."""
    return math.inf if loss > 709 else math.exp(loss)


def median_speeds(records: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """Median tokens/s of the full-precision and the QAT steps, from a run's metrics events, in order.

    Intervals with warm-up steps are left out (evaluation and checkpoints are in none); None where fewer than
    LEAST_STEPS are left, which is no speed to keep. An interval counts as often as it has steps.
    """
    speeds: dict[str, list[float]] = {"fp": [], "qat": []}
    before, kinds = 0, set()
    for record in records:
        kind = "qat" if record["phase"].startswith("qat_") else "fp"
        if not record.get("warmup", kind not in kinds):  # runs of before there was the mark: each kind's first one
            speeds[kind] += [record["tokens_per_second"]] * (record["step"] - before)
        kinds.add(kind)
        before = record["step"]
    return {
        f"tokens_per_second_{kind}": median(values) if len(values) >= LEAST_STEPS else None
        for kind, values in speeds.items()
    }
