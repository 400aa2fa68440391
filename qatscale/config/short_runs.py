"""The lengths of a shipped recipe are defaults: they give way in a run that is too short for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qatscale.config.amounts import format_amount
from qatscale.config.schema import RunConfig


def fit_lengths(config: RunConfig, shipped: RunConfig, given: Sequence[str]) -> RunConfig:
    """`config` with a warm-up and a cooldown that fit into its steps; itself where they already do.

    shipped: the recipe without overrides. given: the overridden keys, whose values never change.
    """
    own, per_step = config.schedule, config.tokens_per_step
    notes = []
    if "tokens" not in given and config.tokens < per_step:
        config = config.model_copy(update={"tokens": shipped.steps * per_step})
        notes.append(
            f"the recipe's {format_amount(shipped.tokens)} tokens are less than one step; tokens={config.tokens} are "
            f"as many steps as it has, {shipped.steps}"
        )
    changed: dict[str, Any] = {}
    warmup = round((own.warmup_tokens or (own.warmup_fraction or 0) * config.tokens) / per_step)
    room, shortest = _room(config)
    if not any(key.startswith("schedule.cooldown") for key in given):
        too_long = warmup > room and any(key.startswith("schedule.warmup") for key in given)
        if too_long or not round((own.cooldown_fraction or 0) * shortest):
            changed["cooldown_fraction"] = None  # of the same length, and cut to what is left
    vanishes = own.warmup_tokens and not warmup  # below half a step
    if (warmup > room or vanishes) and not any(key.startswith("schedule.warmup") for key in given):
        assert shipped.schedule.warmup_tokens is not None
        share = shipped.schedule.warmup_tokens / shipped.tokens
        changed["warmup_tokens"] = tokens = max(per_step, round(share * config.tokens))
        notes.append(
            f"the recipe's warm-up of {format_amount(shipped.schedule.warmup_tokens)} tokens does not fit; "
            f"schedule.warmup_tokens={tokens} is the same share of this run, {share:.2g}"
        )
    fitted = config.model_copy(update={"schedule": own.model_copy(update=changed)})
    fitted._notes = tuple(notes)
    return fitted


def _room(config: RunConfig) -> tuple[int, int]:
    """Steps that the first phase leaves for its warm-up, and steps of the shortest phase that ends with a cooldown."""
    steps, qat, own = config.steps, config.qat, config.schedule

    def cooldown(phase: int) -> int:
        return round((own.cooldown_tokens or 0) / config.tokens_per_step or (own.cooldown_fraction or 0) * phase)

    switch = None if qat.fraction == "auto" else round((1 - qat.fraction) * steps)
    match qat.scheme:
        case "sequential":
            first = steps - 3 if switch is None else switch  # the shortest phase with a cooldown of a fifth has 3 steps
            return first - cooldown(first), steps // 2 if switch is None else min(switch, steps - switch)
        case "fused":
            return min(steps - cooldown(steps), steps if switch is None else switch), steps
        case _:
            return steps - cooldown(steps), steps
