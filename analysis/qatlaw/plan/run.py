"""Question 1: a model size, tokens and a bit width to the split of the tokens, and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qatlaw.errors import InputError
from qatlaw.fraction import extrapolation_warning, optimal_fraction, tokens_per_parameter_byte
from qatlaw.plan.waste import optimal_loss, split_loss, wasted_tokens
from qatlaw.planner_law import PlannerLaw

RULE = 0.1
"""The customary share of the tokens for QAT, to compare with."""
DIGITS = 6
"""Of a fraction in a recipe: 1e-6 of the tokens is less than an optimizer step of any but a very long run."""

Basis = Literal["closed form", "loss law"]
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
            f"planned is a QAT fraction of {planned:.1%}, the {bound} that holds the warm-up and cooldown of scheme "
            f"{self.name}; the optimum is {optimum:.1%}",
        )


SEQUENTIAL = Scheme()
"""The classic scheme, whose lengths are shares of each phase."""


@dataclass(frozen=True)
class Recipe:
    """What is known of the run to plan: what was asked, and what a recipe of the training stack adds; None: unknown."""

    params: float | None = None
    tokens: float | None = None
    bits: float | None = None
    tokens_per_step: int | None = None
    flops_per_token: float | None = None
    """Forward and backward; None: 6 for each parameter."""
    scheme: Scheme = SEQUENTIAL


@dataclass(frozen=True)
class Split:
    """What the law says of one way to split the tokens."""

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
    """Of a full-precision run of the same tokens."""
    rule: Split
    """The rule of 10 %."""
    closed_form: Split | None
    """None where the closed form is not defined."""
    level: float | None = None
    """Share of the resampled laws inside the intervals; None where the law has none."""
    fraction_interval: Interval | None = None
    loss_interval: Interval | None = None


@dataclass(frozen=True)
class RunPlan:
    """How a run of `tokens` should be split. tokens_fp + tokens_qat = tokens, exactly."""

    params: int
    tokens: int
    bits: float
    S: float
    """Tokens per parameter byte."""
    fraction: float
    """QAT's share of the tokens, before it is rounded to whole tokens (here) or optimizer steps (in a run)."""
    optimum: float
    """The optimal share; `fraction` differs from it only where the scheme cannot hold it."""
    basis: Basis
    """What `optimum` comes from."""
    closed_form: float | None
    """The closed form's fraction; None where it is not defined."""
    tokens_fp: int
    tokens_qat: int
    steps: int | None
    """Optimizer steps of the run; None where the batch is not known."""
    switch_step: int | None
    """The first step in QAT, 0-based."""
    prediction: Prediction | None
    """None without a loss law."""
    warnings: tuple[str, ...]
    """What a reader must know before trusting the numbers; empty inside the measured ranges."""
    overrides: tuple[str, ...]
    """`key=value` settings that put the plan into a recipe."""

    @property
    def loss(self) -> float | None:
        """Predicted, in nats per token; None without a loss law."""
        return self.prediction.loss if self.prediction else None


def plan_run(
    params: float,
    tokens: float,
    bits: float,
    *,
    law: PlannerLaw | None = None,
    tokens_per_step: int | None = None,
    scheme: Scheme = SEQUENTIAL,
) -> RunPlan:
    """The plan for a model of `params` parameters (a tied embedding counted once), `tokens` tokens and `bits` bits.

    law: its optimum is planned, and its losses are told; without one the closed form decides. `scheme` may move it.
    tokens_per_step: of an optimizer step, for the switch step.

    InputError where an amount is not positive, or without a law where S <= 1 (see `qatlaw.fraction.optimal_fraction`).
    """
    S = tokens_per_parameter_byte(params, tokens, bits)
    optimum, basis = optimum_of(params, tokens, bits, law)
    params, tokens = round(params), round(tokens)
    planned = scheme.nearest(optimum, tokens)
    steps = None if tokens_per_step is None else max(1, round(tokens / tokens_per_step))
    text = written_fraction(planned, steps)
    tokens_qat = round(planned * tokens)
    return RunPlan(
        params=params,
        tokens=tokens,
        bits=bits,
        S=S,
        fraction=planned,
        optimum=optimum,
        basis=basis,
        closed_form=closed_form(S),
        tokens_fp=tokens - tokens_qat,
        tokens_qat=tokens_qat,
        steps=steps,
        switch_step=None if steps is None else switch_step(planned, steps),
        prediction=None if law is None else _predict(law, params, tokens, bits, optimum, planned),
        warnings=(*scheme.warnings(optimum, planned), *warnings_of(params, tokens, bits, law)),
        overrides=overrides_of(tokens, bits, scheme, text),
    )


def overrides_of(tokens: float, bits: float, scheme: Scheme, fraction: str) -> tuple[str, ...]:
    """The `key=value` settings of a planned run."""
    return (f"tokens={round(tokens)}", f"qat.bits={bits:g}", f"qat.scheme={scheme.name}", f"qat.fraction={fraction}")


def closed_form(S: float) -> float | None:
    """The closed form's fraction, None where it has none (or, just above S = 1, one too small for a number)."""
    return (optimal_fraction(S) or None) if S > 1 else None


def optimum_of(params: float, tokens: float, bits: float, law: PlannerLaw | None) -> tuple[float, Basis]:
    """The optimal fraction by the law, or else by the closed form. InputError where the closed form is not defined."""
    if law is not None:
        law.check_bits(bits)
        return float(law.law.optimal_fraction(params, tokens, bits)), "loss law"
    try:
        return optimal_fraction(tokens_per_parameter_byte(params, tokens, bits)), "closed form"
    except ValueError as error:
        units = "Are --params and --tokens in the right units (396M, 100B)?"
        raise InputError("plan", None, f"{error}.", units) from None


def warnings_of(params: float, tokens: float, bits: float, law: PlannerLaw | None) -> tuple[str, ...]:
    """Which numbers of a plan lie outside the range of the data behind them: the law's, or the closed form's."""
    found = extrapolation_warning(params, tokens, bits) if law is None else law.warning(params, tokens, bits)
    return (found,) if found else ()


def switch_step(fraction: float, steps: int) -> int:
    """The first QAT step of a recipe with this `qat.fraction`: as the timeline of a run rounds it."""
    return round((1 - fraction) * steps)


def written_fraction(fraction: float, steps: int | None = None) -> str:
    """A fraction for a recipe, in as few digits, four or more, as give the same switch step."""
    if steps is None:
        return f"{fraction:.{DIGITS}g}"
    same = (f"{fraction:.{digits}g}" for digits in range(4, 17))
    return next(text for text in same if switch_step(float(text), steps) == switch_step(fraction, steps))


def judge_split(law: PlannerLaw, params: float, tokens: float, bits: float, fraction: float) -> Split:
    """What the law says of QAT on this fraction of the tokens. InputError where it is not inside (0, 1)."""
    loss = split_loss(law.law, params, tokens, fraction, bits)
    return Split(fraction, float(loss), float(wasted_tokens(law.law, params, tokens, fraction, bits)))


def _predict(law: PlannerLaw, params: int, tokens: int, bits: float, optimum: float, planned: float) -> Prediction:
    best = optimal_loss(law.law, params, tokens, bits)
    closed = closed_form(tokens_per_parameter_byte(params, tokens, bits))
    intervals: dict[str, float | Interval] = {}
    if law.bootstrap is not None:
        low_f, high_f = law.bootstrap.fraction(params, tokens, bits)
        low, high = law.bootstrap.loss(params, (1 - planned) * tokens, planned * tokens, bits)
        intervals = {"level": law.bootstrap.level, "fraction_interval": (float(low_f), float(high_f))}
        if math.isfinite(low):
            intervals["loss_interval"] = float(low), float(high)
    return Prediction(
        loss=float(best if planned == optimum else split_loss(law.law, params, tokens, planned, bits)),
        full_precision_loss=float(law.law.loss(params, tokens, 0.0, bits)),
        rule=judge_split(law, params, tokens, bits, RULE),
        closed_form=None if closed is None else judge_split(law, params, tokens, bits, closed),
        **intervals,  # type: ignore[arg-type]  # each its own
    )
