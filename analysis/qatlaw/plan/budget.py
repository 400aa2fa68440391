"""Question 4: tokens and their split for FLOPs or GPU-hours, where a QAT token may cost more than a full-precision one.

At the token-optimal fraction, replacing a full-precision token by a QAT token gains nothing. If it costs more, the same
budget buys more tokens at a smaller fraction, so the *compute*-optimal fraction is smaller. With the costs c per token
and the budget C,

    minimise L(N, D_fp, D_qat, B)    where    c_fp D_fp + c_qat D_qat = C

L is convex along that line (its terms are powers with negative exponents), so it has one minimum there [ours].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.errors import InputError
from qatlaw.fraction import closed_form, tokens_per_parameter_byte
from qatlaw.fraction_laws import PAPER
from qatlaw.laws.base import Floats, Law
from qatlaw.plan.root import falling_root
from qatlaw.plan.run import SEQUENTIAL, Scheme, overrides_of, warnings_of, written_fraction
from qatlaw.planner_law import PlanLaw

FLOPS_PER_PARAMETER = 6.0
"""Forward and backward per token, 2 + 4, without the attention scores, which depend on the sequence length."""
WIDEST_LOGIT = 16.0
"""Shares of the budget from 1e-7 to 1 - 1e-7 are searched."""
POINTS = 41
ROUNDS = 6
"""Each tries POINTS splits and narrows the search 20 times; what is left is 2e-7 of the logit."""
SIZES = (1e6, 1e13)
"""Parameters between which the best size is searched."""


@dataclass(frozen=True)
class Budget:
    """An amount to spend, and the cost of a token of each phase."""

    amount: float
    unit: str
    """FLOPs or GPU-hours."""
    fp_cost: float
    qat_cost: float

    def __post_init__(self) -> None:
        for name, value in (("amount", self.amount), ("fp_cost", self.fp_cost), ("qat_cost", self.qat_cost)):
            if not (np.isfinite(value) and value > 0):
                raise InputError(f"budget.{name}", value, "is not a positive finite number.")

    @property
    def overhead(self) -> float:
        """Cost of a QAT token over that of a full-precision one."""
        return self.qat_cost / self.fp_cost


@dataclass(frozen=True)
class BudgetSplit:
    """One way to spend a budget."""

    name: str
    """`compute-optimal`, `token-optimal`, `closed form` or `planned`."""
    fraction: float
    tokens: float
    tokens_qat: float
    loss: float | None
    """Nats per token; None without a law."""


@dataclass(frozen=True)
class BudgetPlan:
    params: int
    bits: float
    budget: Budget
    compute_optimal: BudgetSplit | None
    """None without a law."""
    token_optimal: BudgetSplit | None
    """The budget spent at the fraction that is optimal if only tokens count; None without a law."""
    closed_form: BudgetSplit | None
    """The budget spent at the closed form's fraction; None where that is not defined."""
    chosen: BudgetSplit
    """The compute-optimal split, without a law the closed form's; or the nearest that the scheme holds."""
    overrides: tuple[str, ...]
    """`key=value` settings that put the chosen split into a recipe."""
    warnings: tuple[str, ...]

    @property
    def splits(self) -> list[BudgetSplit]:
        splits = (self.compute_optimal, self.token_optimal, self.closed_form, self.chosen)
        return [split for split in splits if split]


def compute_optimal(
    law: Law, N: ArrayLike, B: ArrayLike, amount: ArrayLike, fp_cost: ArrayLike, qat_cost: ArrayLike
) -> tuple[Floats, Floats]:
    """(f, D): the compute-optimal fraction and the tokens it buys; broadcasts, f to 1e-6.

    amount: the budget. fp_cost, qat_cost: of a token of each phase.
    """
    arrays = (np.asarray(value, np.float64) for value in (N, B, amount, fp_cost, qat_cost))
    N, B, amount, fp_cost, qat_cost = (value[..., None] for value in np.broadcast_arrays(*arrays))
    center, half = np.zeros(amount.shape), WIDEST_LOGIT
    grid = np.linspace(-1.0, 1.0, POINTS)
    for _ in range(ROUNDS):
        share = 1 / (1 + np.exp(-(center + half * grid)))  # of the budget, for QAT
        loss = law.loss(N, (1 - share) * amount / fp_cost, share * amount / qat_cost, B)
        center = center + half * grid[np.argmin(loss, axis=-1)][..., None]
        half *= 2 / (POINTS - 1)
    share = 1 / (1 + np.exp(-center))
    D_fp, D_qat = ((1 - share) * amount / fp_cost)[..., 0], (share * amount / qat_cost)[..., 0]
    return D_qat / (D_fp + D_qat), D_fp + D_qat


def best_size(law: Law, B: float, amount: float, fp_cost: float, qat_cost: float) -> float:
    """N with the lowest loss of a budget, at its compute-optimal split. Costs per token *and parameter*.

    The loss is convex in log N, as every term is a power of N once the budget fixes the tokens.
    """
    center, half = np.log(SIZES).mean(), np.log(SIZES[1] / SIZES[0]) / 2
    grid = np.linspace(-1.0, 1.0, POINTS)
    for _ in range(ROUNDS):
        N = np.exp(center + half * grid)
        f, D = compute_optimal(law, N, B, amount, fp_cost * N, qat_cost * N)
        center += half * grid[np.argmin(law.loss(N, (1 - f) * D, f * D, B))]
        half *= 2 / (POINTS - 1)
    return float(np.exp(center))


def spend(budget: Budget, fraction_of: Callable[[float], float]) -> tuple[float, float]:
    """(f, D) of a budget whose fraction follows a rule, f = fraction_of(D): D (c_fp (1-f) + c_qat f) = amount."""
    costs = sorted((budget.fp_cost, budget.qat_cost))

    def left(D: Floats) -> float:
        f = fraction_of(float(D))
        return budget.amount - float(D) * (budget.fp_cost * (1 - f) + budget.qat_cost * f)

    D = float(falling_root(left, budget.amount / costs[1], budget.amount / costs[0]))
    return fraction_of(D), D


def plan_budget(
    params: float | None, bits: float, budget: Budget, *, law: PlanLaw = PAPER, scheme: Scheme = SEQUENTIAL
) -> BudgetPlan:
    """The split of a budget for a model of `params` parameters at `bits` bits.

    params: None for the size with the lowest loss, by a law; the budget's costs are then per token and parameter.
    Without a law the compute-optimal fraction is unknown, and the closed form's, which counts tokens, is planned.
    `scheme` may move the plan. InputError where neither is defined.
    """
    law.check_bits(bits)
    losses = law.law
    if params is None:
        if losses is None:
            fix = "Add --params 396M, or --law fit.json to have the best size chosen."
            raise InputError("--params", None, "is missing.", fix)
        params = round(best_size(losses, bits, budget.amount, budget.fp_cost, budget.qat_cost))
        budget = replace(budget, fp_cost=budget.fp_cost * params, qat_cost=budget.qat_cost * params)

    def closed(D: float) -> float:
        return closed_form(params, D, bits) or 0.0

    def split(name: str, f: float, D: float) -> BudgetSplit:
        loss = None if losses is None else float(losses.loss(params, (1 - f) * D, f * D, bits))
        return BudgetSplit(name, f, D, f * D, loss)

    f, D = spend(budget, closed)
    if D > 1e18:
        fix = "Take a larger model or a smaller budget."
        raise InputError("budget", f"{budget.amount:g} {budget.unit}", f"buys {D:.3g} tokens, more than 1e18.", fix)
    S = tokens_per_parameter_byte(params, D, bits)
    by_closed_form = split("closed form", f, D) if S > 1 else None
    by_compute, by_tokens = None, None
    if losses is not None:
        best = compute_optimal(losses, params, bits, budget.amount, budget.fp_cost, budget.qat_cost)
        by_compute = split("compute-optimal", float(best[0]), float(best[1]))
        optimal = spend(budget, lambda D: law.optimal_fraction(params, D, bits))
        by_tokens = split("token-optimal", *optimal)
    optimum = by_compute or by_closed_form
    if optimum is None:
        problem = f"buys {D:.3g} tokens, {S:.3g} per parameter byte, and the closed form needs more than 1."
        fix = "Take a smaller model or a larger budget."
        raise InputError("budget", f"{budget.amount:g} {budget.unit}", problem, fix)
    chosen = replace(optimum, name="planned")
    if scheme.nearest(optimum.fraction, optimum.tokens) != optimum.fraction:
        chosen = split("planned", *spend(budget, lambda D: scheme.nearest(optimum.fraction, D)))
    moved = scheme.warnings(optimum.fraction, chosen.fraction)
    overrides = overrides_of(chosen.tokens, bits, scheme, written_fraction(chosen.fraction))
    warnings = (*moved, *warnings_of(params, chosen.tokens, bits, law))
    return BudgetPlan(
        params=round(params), bits=bits, budget=budget, compute_optimal=by_compute, token_optimal=by_tokens,
        closed_form=by_closed_form, chosen=chosen, overrides=overrides, warnings=warnings,
    )  # fmt: skip
