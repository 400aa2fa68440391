"""Where two timelines part: a branch equals its parent only up to there."""

from __future__ import annotations

from qatscale.schedule.timeline import Timeline


def first_difference(first: Timeline, second: Timeline, until: int) -> str | None:
    """The first step < `until` at which two timelines prescribe different settings, and in what; None where none does.

    A branch equals its parent up to its start only if this is None for `until` = the start. Compared are the learning
    rate, betas, weight decay and quantization, but not the names of phases.
    """
    step = 0
    while step < until:
        if step >= min(first.steps, second.steps):
            return _text("steps", step, first.steps, second.steps) if first.steps != second.steps else None
        a, b = first.segment_at(step), second.segment_at(step)
        end = min(a.end, b.end, until)
        # Within one pair of segments only the rate moves, and of equal or stable ones it moves alike: one look.
        same_curve = a == b or (a.kind == b.kind == "stable")
        for probe in range(step, step + 1 if same_curve else end):
            one, other = a.at(probe), b.at(probe)
            for setting in ("quantized", "learning_rate", "betas", "weight_decay"):
                left, right = getattr(one, setting), getattr(other, setting)
                if left != right:
                    return _text(setting, probe, left, right)
        step = end
    return None


def _text(setting: str, step: int, first: object, second: object) -> str:
    return f"{setting} at step {step}: {first!r} against {second!r}"
