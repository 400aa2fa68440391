"""Metrics records as points of a curve: each a mean over half a logging interval at least.

A record ends where a phase ends or a checkpoint is saved, so some average over one or two steps and would show the
noise of single batches as a jump. metrics.jsonl keeps them as they are; curves and MLflow show these points.
"""

from __future__ import annotations

from typing import Any

from qatscale.tracking.records import Record

_RATES = ("tokens_per_second", "tflops", "mfu")


class Averages:
    """Takes a run's metrics records in order.

    A record of fewer steps than half of `log_interval` is averaged with those before it, back to that many steps; but
    not across the switch, where the loss jumps. With too few before it, it is left to the next record.
    """

    def __init__(self, log_interval: int, first_step: int = 0) -> None:
        """first_step: steps done before the first record; a branch's parent has done them."""
        self._interval, self._least, self._done = log_interval, log_interval / 2, first_step
        self._recent: list[tuple[int, Record]] = []
        """(steps, record) of the newest records on this side of the switch, enough for the next mean."""
        self._left_over = 0
        """How many of the newest were in no point yet."""

    def add(self, record: Record) -> tuple[int, Record] | None:
        """(steps that no earlier point holds, the record with means over its steps), or None if left to the next.

        Loss and speeds are weighted by steps, data_seconds is summed, all else is the last record's.
        """
        steps = record.get("steps") or self._derived(record["step"])
        started = record["step"] - steps
        # what a resume takes back, and what lies before the switch or before a gap, is in no mean with this one
        self._recent = [part for part in self._recent if part[1]["step"] <= started]
        last = self._recent[-1][1] if self._recent else None
        if last and (last["step"] != started or _is_quantized(last) != _is_quantized(record)):
            self._recent = []
        self._left_over = min(self._left_over, len(self._recent))
        self._done = record["step"]
        self._recent.append((steps, record))
        self._left_over += 1
        size, held = 0, 0
        while size < len(self._recent) and (held < self._least or size < self._left_over):
            size += 1
            held += self._recent[-size][0]
        self._recent = self._recent[-size:]
        if held < self._least:
            return None
        fresh = sum(count for count, _ in self._recent[-self._left_over :])
        self._left_over = 0
        return fresh, _mean(self._recent)

    def _derived(self, step: int) -> int:
        """Steps of a record that does not tell them: those since the one before; after a resume a usual record's."""
        return min(step - self._done if step > self._done else step, self._interval)


def _is_quantized(record: Record) -> bool:
    return record["phase"].startswith("qat_")


def _mean(parts: list[tuple[int, Record]]) -> Record:
    if len(parts) == 1:
        return parts[0][1]
    last: Record = dict(parts[-1][1])
    total = sum(steps for steps, _ in parts)
    means: dict[str, Any] = {"loss": sum(steps * record["loss"] for steps, record in parts) / total}
    for name in _RATES:  # per second, so steps over the sum of their seconds
        if last.get(name):
            means[name] = total / sum(steps / record[name] for steps, record in parts)
    if "data_seconds" in last:
        means["data_seconds"] = sum(record["data_seconds"] for _, record in parts)
    return last | means
