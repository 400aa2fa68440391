"""Metrics records as points of a curve, each a mean over at least half a logging interval.

A record ends where a phase ends or a checkpoint is saved, so some records average one or two steps. The noise of single
batches would then look like a jump. metrics.jsonl keeps the records; curves and MLflow show these points.
"""

from __future__ import annotations

from typing import Any

from qatscale.tracking.records import Record

_RATES = ("tokens_per_second", "tflops", "mfu")


class Averages:
    """Takes a run's metrics records in order.

    A record of fewer steps than half of `log_interval` is averaged with the ones before it, up to that many steps. No
    mean crosses the switch, where the loss jumps. If they are too few, it waits for the next record.
    """

    def __init__(self, log_interval: int, first_step: int = 0) -> None:
        """first_step: steps done before the first record; those of a branch's parent."""
        self._interval, self._least, self._done = log_interval, log_interval / 2, first_step
        self._recent: list[tuple[int, Record]] = []
        """(steps, record) of the newest records on this side of the switch, enough for the next mean."""
        self._waiting = 0
        """How many of the newest records are in no point yet."""

    def add(self, record: Record) -> tuple[int, Record] | None:
        """(steps that no earlier point holds, the record with means over its steps), or None if it waits.

        Loss and speeds are weighted by steps, data_seconds is summed, everything else is the last record's.
        """
        steps = record.get("steps")
        if not steps:  # older runs lack it: the steps since the record before; after a resume a usual record's
            since = record["step"] - self._done
            steps = min(since if since > 0 else record["step"], self._interval)
        started = record["step"] - steps
        # a mean holds nothing that a resume took back, or that lies before a gap or the switch
        self._recent = [part for part in self._recent if part[1]["step"] <= started]
        if self._recent:
            last = self._recent[-1][1]
            if last["step"] != started or _is_quantized(last) != _is_quantized(record):
                self._recent = []
        self._waiting = min(self._waiting, len(self._recent)) + 1
        self._done = record["step"]
        self._recent.append((steps, record))
        size, held = 0, 0
        while size < len(self._recent) and (held < self._least or size < self._waiting):
            size += 1
            held += self._recent[-size][0]
        self._recent = self._recent[-size:]
        if held < self._least:
            return None
        fresh = sum(count for count, _ in self._recent[-self._waiting :])
        self._waiting = 0
        return fresh, _mean(self._recent)


def _is_quantized(record: Record) -> bool:
    return record["phase"].startswith("qat_")


def _mean(parts: list[tuple[int, Record]]) -> Record:
    last: Record = dict(parts[-1][1])
    if len(parts) == 1:
        return last
    total = sum(steps for steps, _ in parts)
    means: dict[str, Any] = {"loss": sum(steps * record["loss"] for steps, record in parts) / total}
    for name in _RATES:  # per second, so steps over the sum of their seconds
        if last.get(name):
            means[name] = total / sum(steps / record[name] for steps, record in parts)
    if "data_seconds" in last:
        means["data_seconds"] = sum(record["data_seconds"] for _, record in parts)
    return last | means
