"""Numbers that a finished run is known by: its losses under stable names, and median speeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from qatlaw.names import VAL_LOSS, VAL_LOSS_FP, VAL_LOSS_PTQ

LEAST_STEPS = 50
"""Steps that a speed of record is the median of, at least."""


def final_losses(losses: Mapping[str, float], own_view: str) -> dict[str, float]:
    """Loss by view (`fp`, `quantized`, `ptq4` …) → loss by stable name. own_view: the view a run is judged by."""
    by_bits = {f"{VAL_LOSS_PTQ}{v.removeprefix('ptq')}": loss for v, loss in losses.items() if v.startswith("ptq")}
    return {VAL_LOSS: losses[own_view], VAL_LOSS_FP: losses["fp"], **by_bits}


def losses_by_view(final: Mapping[str, Any], own_view: str) -> dict[str, float]:
    """The inverse of `final_losses`, from all final metrics of a run."""
    views = {VAL_LOSS: own_view, VAL_LOSS_FP: "fp"}
    views |= {name: f"ptq{name.removeprefix(VAL_LOSS_PTQ)}" for name in final if name.startswith(VAL_LOSS_PTQ)}
    return {view: final[name] for name, view in views.items() if final.get(name) is not None}


def median_speeds(records: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """Median tokens/s of the full-precision and the QAT steps, from a run's metrics events, in order.

    Intervals with warm-up steps are left out (evaluation and checkpoints are in none); None where fewer than
    LEAST_STEPS are left. An interval counts as often as it has steps.
    """
    speeds: dict[str, list[float]] = {"fp": [], "qat": []}
    before, kinds = 0, set()
    for record in records:
        kind = "qat" if record["phase"].startswith("qat_") else "fp"
        if not record.get("warmup", kind not in kinds):  # older runs lack the mark: each kind's first one
            speeds[kind] += [record["tokens_per_second"]] * (record["step"] - before)
        kinds.add(kind)
        before = record["step"]
    return {
        f"tokens_per_second_{kind}": median(values) if len(values) >= LEAST_STEPS else None
        for kind, values in speeds.items()
    }
