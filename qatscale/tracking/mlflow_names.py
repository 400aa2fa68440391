"""What the events and the recipe of a run are called in MLflow. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qatscale.files import encode
from qatscale.tracking.records import Record

_PERF = {"tokens_per_second", "tflops", "mfu", "memory_gib", "data_seconds"}
_NOT_METRICS = {"event", "time", "step", "steps", "phase", "warmup"}
_MAX_PARAM = 6000
"""MLflow's limit on the length of a parameter's value."""


class Point(NamedTuple):
    """One value of one MLflow metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970."""
    step: int


def points(record: Record) -> Iterator[Point]:
    """What one event of metrics.jsonl is in MLflow; null values are left out, NaN and infinities are not."""
    if record["event"] == "metrics":
        named = {
            f"{'perf' if name in _PERF else 'train'}/{name}": value
            for name, value in record.items()
            if name not in _NOT_METRICS
        }
    elif record["event"] == "validation":
        named = {f"val/{name}_{record['view']}": record.get(name) for name in ("loss", "perplexity")}
    elif record["event"] == "final":
        named = record["metrics"]
    else:
        return
    for key, value in named.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield Point(key, float(value), int(record["time"] * 1000), record["step"])


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """MLflow parameters of a recipe: dotted keys; strings as they are, everything else as JSON; cut at MLflow's limit.

    >>> flatten({"qat": {"bits": 4, "scheme": "fused"}, "tokens": None})
    {'qat.bits': '4', 'qat.scheme': 'fused', 'tokens': 'null'}
    """
    flat: dict[str, str] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(encode(value))
            flat[f"{prefix}{key}"] = text if len(text) <= _MAX_PARAM else text[: _MAX_PARAM - 1] + "…"
    return flat
