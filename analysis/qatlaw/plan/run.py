"""Questions 1 and 3: the split of the tokens for a model size, tokens and a bit width, and QAT at each width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qatlaw.amounts import exact_amount
from qatlaw.bit_widths import TOLERANCE, bits_label
from qatlaw.errors import InputError
from qatlaw.fraction import closed_form, tokens_per_parameter_byte
from qatlaw.fraction_laws import PAPER
from qatlaw.laws.nominal import EffectiveBits
from qatlaw.plan.shapes import usual_effective_bits
from qatlaw.plan.waste import optimal_loss, split_loss, wasted_tokens
from qatlaw.planner_law import PlanLaw, PlannerLaw

RULE = 0.1
"""The customary share of the tokens for QAT, for comparison."""
DIGITS = 6
"""Digits of a fraction in a recipe: 1e-6 of the tokens is less than an optimizer step of any but a very long run."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Scheme:
    """How a planned run trains."""

    name: str = "sequential"
    """As `qat.scheme` of a recipe."""
    nearest: Callable[[float, float], float] = lambda fraction, _: fraction
    """(fraction, tokens) -> the nearest fraction whose phases hold the scheme's warm-ups and cooldowns."""

    def warnings(self, optimum: float, planned: float) -> tuple[str, ...]:
        if planned == optimum:
            return ()
        bound = "least" if planned > optimum else "most"
        return (
            f"the planned QAT fraction is {planned:.1%}, the {bound} that holds the warm-up and cooldown of scheme "
            f"{self.name}; the optimum is {optimum:.1%}",
        )


SEQUENTIAL = Scheme()
"""The classic scheme, whose lengths are shares of each phase."""


@dataclass(frozen=True)
class Recipe:
    """The run to plan, by options and by a recipe of the training stack; None: unknown."""

    params: float | None = None
    tokens: float | None = None
    bits: float | None = None
    non_embedding: float | None = None
    """Parameters without embedding and head."""
    group: float | None = None
    """Weights that share a scale; with a scale a row, the model's width."""
    group_size: int | None = None
    """To be set in the recipe."""
    tokens_per_step: int | None = None
    flops_per_token: float | None = None
    """Forward and backward; None: 6 for each parameter."""
    scheme: Scheme = SEQUENTIAL
    stored_bytes: Callable[[float], float] | None = None
    """Bits -> bytes of all its weights with their scales; None: unknown."""
    model: str = ""
    """The model that these bytes are counted on, in words."""

    @property
    def size(self) -> tuple[float, float]:
        """Parameters and tokens. InputError where one is unknown."""
        if self.params is None:
            raise InputError("--params", None, "is missing.", "Add --params 396M.")
        if self.tokens is None:
            raise InputError("--tokens", None, "is missing.", "Add --tokens 100B.")
        return self.params, self.tokens

    @property
    def effective(self) -> EffectiveBits:
        """(N, nominal bits) -> effective bits: its own, or where they are unknown those of usual shapes."""
        if self.stored_bytes is None or self.params is None:
            return usual_effective_bits()
        stored_bytes, params = self.stored_bytes, self.params
        return np.vectorize(lambda _, bits: 8 * stored_bytes(bits) / params, otypes=[float])


@dataclass(frozen=True)
class Split:
    """One way to split the tokens, by the law."""

    fraction: float
    loss: float
    """Nats per token."""
    wasted: float
    """Share of the tokens, see `qatlaw.plan.waste.WASTED`."""


@dataclass(frozen=True)
class Prediction:
    """What needs a loss law. Losses in nats per token."""

    loss: float
    """At the planned fraction."""
    full_precision_loss: float
    rule: Split
    closed_form: Split | None
    level: float | None = None
    """Share of the resampled laws inside the intervals; None where the law has none."""
    fraction_interval: Interval | None = None
    loss_interval: Interval | None = None


@dataclass(frozen=True)
class RunPlan:
    """The split of a run of `tokens`. tokens_fp + tokens_qat = tokens, exactly."""

    params: int
    tokens: int
    bits: float
    """Nominal: of a weight in the blocks."""
    S: float
    """By nominal bits, as the laws have it."""
    stored_bytes: float | None
    """All weights with their scales, embedding and norms; None where the model's shape is not known."""
    fraction: float
    """QAT's share of the tokens, before it is rounded to whole tokens (here) or optimizer steps (in a run)."""
    optimum: float
    """The optimal share; `fraction` differs from it only where the scheme cannot hold it."""
    closed_form: float | None
    tokens_fp: int
    tokens_qat: int
    steps: int | None
    """Optimizer steps of the run; None where the batch is not known."""
    switch_step: int | None
    """The first step in QAT, 0-based."""
    prediction: Prediction | None
    warnings: tuple[str, ...]
    """What a reader must know before trusting the numbers; empty inside the measured ranges."""
    overrides: tuple[str, ...]
    """`key=value` settings that put the plan into a recipe."""

    @property
    def loss(self) -> float | None:
        return self.prediction.loss if self.prediction else None

    @property
    def effective_bits(self) -> float | None:
        return self.stored_bytes and 8 * self.stored_bytes / self.params

    @property
    def tokens_per_stored_byte(self) -> float | None:
        return self.stored_bytes and self.tokens / self.stored_bytes


def plan_run(run: Recipe, bits: float, law: PlanLaw = PAPER) -> RunPlan:
    """The plan for a run at `bits` bits. Its scheme may move the fraction.

    law: gives the optimum, and losses if it has them.

    InputError where the law is not defined: an amount that is not positive, another bit width, S <= 1 in a closed form.
    """
    (params, tokens), scheme = run.size, run.scheme
    S = tokens_per_parameter_byte(params, tokens, bits)
    law.check_bits(bits)
    optimum = law.optimal_fraction(params, tokens, bits)
    params, tokens = round(params), round(tokens)
    planned = scheme.nearest(optimum, tokens)
    steps = None if run.tokens_per_step is None else max(1, round(tokens / run.tokens_per_step))
    tokens_qat = round(planned * tokens)
    return RunPlan(
        params=params, tokens=tokens, bits=bits, S=S, fraction=planned, optimum=optimum,
        stored_bytes=run.stored_bytes(bits) if run.stored_bytes else None,
        closed_form=closed_form(params, tokens, bits), tokens_fp=tokens - tokens_qat, tokens_qat=tokens_qat,
        steps=steps, switch_step=None if steps is None else switch_step(planned, steps),
        prediction=_predict(law, params, tokens, bits, optimum, planned) if isinstance(law, PlannerLaw) else None,
        warnings=(*scheme.warnings(optimum, planned), *warnings_of(params, tokens, bits, law)),
        overrides=overrides_of(tokens, bits, scheme, written_fraction(planned, steps), run.group_size),
    )  # fmt: skip


def overrides_of(
    tokens: float, bits: float, scheme: Scheme, fraction: str, group_size: int | None = None
) -> tuple[str, ...]:
    settings = (
        f"tokens={exact_amount(tokens)}",
        f"qat.bits={bits:g}",
        f"qat.scheme={scheme.name}",
        f"qat.fraction={fraction}",
    )
    return (*settings, f"qat.group_size={group_size}") if group_size else settings


def warnings_of(params: float, tokens: float, bits: float, law: PlanLaw) -> tuple[str, ...]:
    """The numbers of a plan outside the range of the data behind them."""
    warning = law.warning(params, tokens, bits)
    return (warning,) if warning else ()


def switch_step(fraction: float, steps: int) -> int:
    """The first QAT step of a recipe with this `qat.fraction`: as the timeline of a run rounds it."""
    return round((1 - fraction) * steps)


def written_fraction(fraction: float, steps: int | None = None) -> str:
    """A fraction for a recipe, in the fewest digits (at least four) that give the same switch step."""
    if steps is None:
        return f"{fraction:.{DIGITS}g}"
    same = (f"{fraction:.{digits}g}" for digits in range(4, 17))
    return next(text for text in same if switch_step(float(text), steps) == switch_step(fraction, steps))


def judge_split(law: PlannerLaw, params: float, tokens: float, bits: float, fraction: float) -> Split:
    """QAT on this fraction of the tokens, by the law. InputError where the fraction is not inside (0, 1)."""
    loss = split_loss(law.law, params, tokens, fraction, bits)
    return Split(fraction, float(loss), float(wasted_tokens(law.law, params, tokens, fraction, bits)))


def _predict(law: PlannerLaw, params: int, tokens: int, bits: float, optimum: float, planned: float) -> Prediction:
    best = optimal_loss(law.law, params, tokens, bits)
    closed = closed_form(params, tokens, bits)
    prediction = Prediction(
        loss=float(best if planned == optimum else split_loss(law.law, params, tokens, planned, bits)),
        full_precision_loss=float(law.law.loss(params, tokens, 0.0, bits)),
        rule=judge_split(law, params, tokens, bits, RULE),
        closed_form=None if closed is None else judge_split(law, params, tokens, bits, closed),
    )
    if (drawn := law.bootstrap) is None:
        return prediction
    low, high = map(float, drawn.loss(params, (1 - planned) * tokens, planned * tokens, bits))
    losses = (low, high) if math.isfinite(low) else None
    low, high = map(float, drawn.fraction(params, tokens, bits))
    return replace(prediction, level=drawn.level, fraction_interval=(low, high), loss_interval=losses)


# --- every width ---


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
    rows: tuple[Any, ...]
    """Each a `WidthRow`, or under a published law a `qatlaw.plan.published.ScratchRow`."""
    tolerance: float
    smallest: int | None
    """Index of the smallest width whose gap is within the tolerance, if any; None without a law."""
    warnings: tuple[str, ...]


def compare_widths(
    run: Recipe, widths: Sequence[float], law: PlanLaw = PAPER, tolerance: float = TOLERANCE
) -> Comparison:
    """QAT at each of `widths`, as `plan_run` plans it, against a full-precision run of the same tokens."""
    rows = []
    for bits in widths:
        plan = plan_run(run, bits, law)
        gap = plan.prediction.loss - plan.prediction.full_precision_loss if plan.prediction else None
        rows.append(WidthRow(bits, plan, gap))
    within = [i for i, row in enumerate(rows) if row.gap is not None and row.gap <= tolerance]
    params, tokens = run.size
    first = rows[0].plan.prediction
    smallest = min(within, key=lambda i: rows[i].bits, default=None)
    full, warnings = first.full_precision_loss if first else None, width_warnings([row.plan for row in rows])
    return Comparison(
        params=round(params), tokens=round(tokens), full_precision_loss=full, rows=tuple(rows),
        tolerance=tolerance, smallest=smallest, warnings=warnings,
    )  # fmt: skip


def width_warnings(plans: Sequence[RunPlan]) -> tuple[str, ...]:
    return tuple(f"{bits_label(plan.bits)}: {warning}" for plan in plans for warning in plan.warnings)
