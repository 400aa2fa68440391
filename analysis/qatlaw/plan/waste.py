"""The cost of a split of the tokens, in tokens.

wasted tokens [ours]: a run of D tokens at fraction f has the loss that D' tokens at their optimal fraction have;
1 - D'/D of its tokens were wasted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.errors import InputError
from qatlaw.laws.base import Floats, Law
from qatlaw.plan.root import falling_root

WASTED = "wasted: 1 - D'/D, where D' tokens at their optimal fraction reach the same loss"
SAVED = "saved: 1 - D/D_u, where the sequential scheme needs D_u tokens at its optimal fraction for the fused loss"

EPSILON = np.finfo(np.float64).eps
REACH = 32.0
"""Distance, in log tokens, beyond which a loss counts as out of reach."""


def split_loss(law: Law, N: ArrayLike, D: ArrayLike, f: ArrayLike, B: ArrayLike) -> Floats:
    """Loss of D tokens, the share f of them in QAT."""
    D, f = np.asarray(D, np.float64), np.asarray(f, np.float64)
    return law.loss(N, (1 - f) * D, f * D, B)


def optimal_loss(law: Law, N: ArrayLike, D: ArrayLike, B: ArrayLike) -> Floats:
    """L*(N, D, B), the loss of D tokens at their optimal fraction."""
    f = np.minimum(law.optimal_fraction(N, D, B), 1 - EPSILON)  # with very many tokens, nearly all are for QAT
    return split_loss(law, N, D, f, B)


def tokens_for_loss(law: Law, N: ArrayLike, loss: ArrayLike, B: ArrayLike, near: ArrayLike) -> Floats:
    """D with L*(N, D, B) = loss; broadcasts. Infinite where no number of tokens reaches it, 0 where any does.

    near: tokens about which the search lies.
    """
    N, loss, B, near = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in (N, loss, B, near)))

    def gap(x: Floats) -> Floats:
        return optimal_loss(law, N, np.exp(x), B) - loss

    low, high = np.log(near) - REACH, np.log(near) + REACH
    tokens = np.where(gap(high) > 0, np.inf, np.exp(falling_root(gap, low, high)))
    return np.where(gap(low) <= 0, 0.0, tokens)


def wasted_tokens(law: Law, N: ArrayLike, D: ArrayLike, f: ArrayLike, B: ArrayLike) -> Floats:
    """Share of D that the fraction f wastes, in [0, 1); 0 at the optimal fraction. Broadcasts.

    InputError where f is not inside (0, 1): a run at its ends does not have two phases.
    """
    shares = np.asarray(f, np.float64)
    if not np.all((shares > 0) & (shares < 1)):
        raise InputError("fraction", shares.tolist(), "is not a QAT fraction: one lies between 0 and 1.")
    loss = split_loss(law, N, D, f, B)
    return np.maximum(0.0, 1 - tokens_for_loss(law, N, loss, B, D) / np.asarray(D, np.float64))


@dataclass(frozen=True)
class FusionSaving:
    """The gain of fusing QAT with the cooldown, in tokens."""

    sequential_tokens: float
    """D_u: L*(N, D_u, B) = L*(N, D, B) + fused loss - sequential loss."""
    saved: float
    """1 - D/D_u; below 0 where fusion loses."""


def fusion_saving(law: Law, N: float, D: float, B: float, fused_loss: float, sequential_loss: float) -> FusionSaving:
    """From the measured losses of a fused and a sequential run of the same N, D and B, in nats per token.

    Only their difference counts: the law converts it to tokens. InputError where no number of tokens is worth it.
    """
    target = optimal_loss(law, N, D, B) + fused_loss - sequential_loss
    tokens = float(tokens_for_loss(law, N, target, B, D))
    if not np.isfinite(tokens):
        gain = sequential_loss - fused_loss
        problem = f"is {gain:.4g} nats below the sequential loss; by the law, no number of tokens gains that much here."
        raise InputError("--fused-loss", fused_loss, problem)
    if tokens == 0:
        problem = f"is {fused_loss - sequential_loss:.4g} nats above the sequential loss; no run loses that."
        raise InputError("--fused-loss", fused_loss, problem)
    return FusionSaving(tokens, 1 - D / tokens)
