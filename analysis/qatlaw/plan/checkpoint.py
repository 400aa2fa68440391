"""Question 5: full-precision tokens that are spent already to the QAT tokens they deserve.

Every further QAT token lowers the loss, so none is the last. What D_fp tokens *deserve* [ours] is the D_qat that makes
the whole run a token-optimal one: D with (1 - f*(D)) D = D_fp, and D_qat = D - D_fp. Fewer, and the full-precision
tokens were too many; more, and they would have been better spent before the switch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qatlaw.errors import InputError
from qatlaw.fraction import tokens_per_parameter_byte
from qatlaw.plan.run import Basis, closed_form, warnings_of, written_fraction
from qatlaw.planner_law import PlannerLaw

MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the deserved tokens, for the table of what they buy."""
HALVINGS = 100
DOUBLINGS = 60
STEP = 1e-4
"""Of log tokens, for the slope of the loss."""


@dataclass(frozen=True)
class Purchase:
    """What some number of QAT tokens buys."""

    tokens_qat: int
    multiple: float
    """Of the deserved ones."""
    fraction: float
    """Of all tokens."""
    loss: float | None
    slope: float | None
    """Nats per billion further QAT tokens, from here; below 0. Both None without a law."""


@dataclass(frozen=True)
class CheckpointPlan:
    params: int
    bits: float
    tokens_fp: int
    tokens_qat: int
    """Deserved."""
    basis: Basis
    purchases: tuple[Purchase, ...]
    loss: float | None
    """With the deserved tokens; None without a law."""
    full_precision_loss: float | None
    """Of a finished full-precision run of tokens_fp; None without a law."""
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.tokens_fp + self.tokens_qat

    @property
    def fraction(self) -> float:
        return self.tokens_qat / self.tokens

    def whole_steps(self, tokens_per_step: int) -> CheckpointPlan:
        """The same with QAT tokens rounded to optimizer steps, at least one."""
        steps = max(1, round(self.tokens_qat / tokens_per_step))
        return replace(self, tokens_qat=steps * tokens_per_step)

    def overrides(self, tokens_per_step: int | None = None) -> tuple[str, ...]:
        """Without the scheme, which depends on where in its schedule the checkpoint lies."""
        steps = None if tokens_per_step is None else round(self.tokens / tokens_per_step)
        text = written_fraction(self.fraction, steps)
        return (f"tokens={self.tokens}", f"qat.bits={self.bits:g}", f"qat.fraction={text}")


def plan_checkpoint(
    params: float,
    bits: float,
    tokens_fp: float,
    *,
    law: PlannerLaw | None = None,
    multiples: Sequence[float] = MULTIPLES,
) -> CheckpointPlan:
    """QAT tokens for a checkpoint that saw `tokens_fp` full-precision tokens, by the law or else by the closed form.

    InputError where no number of tokens makes them the optimal share.
    """
    basis: Basis = "closed form" if law is None else "loss law"
    if law is not None:
        law.check_bits(bits)

    def full_precision_tokens(D: float) -> float:
        if law is not None:
            f = float(law.law.optimal_fraction(params, D, bits))
        else:
            f = closed_form(tokens_per_parameter_byte(params, D, bits)) or 0.0
        return (1 - f) * D

    deserved = _total(full_precision_tokens, tokens_fp) - tokens_fp
    if law is None and tokens_per_parameter_byte(params, tokens_fp + deserved, bits) <= 1:
        raise InputError(
            "trained tokens",
            tokens_fp,
            f"is less than a token per byte of {params:g} parameters at {bits:g} bits; the closed form needs more.",
            "Are --params and the tokens in the right units?",
        )

    def loss(q: float) -> float:
        assert law is not None
        return float(law.law.loss(params, tokens_fp, q, bits))

    purchases = []
    for multiple in multiples:
        q = multiple * deserved
        slope = None if law is None else (loss(q * np.exp(STEP)) - loss(q * np.exp(-STEP))) / (2 * STEP) / q * 1e9
        purchases.append(Purchase(round(q), multiple, q / (tokens_fp + q), None if law is None else loss(q), slope))
    return CheckpointPlan(
        params=round(params),
        bits=bits,
        tokens_fp=round(tokens_fp),
        tokens_qat=round(deserved),
        basis=basis,
        purchases=tuple(purchases),
        loss=None if law is None else loss(deserved),
        full_precision_loss=None if law is None else float(law.law.loss(params, tokens_fp, 0.0, bits)),
        warnings=warnings_of(params, tokens_fp + deserved, bits, law),
    )


def _total(full_precision_tokens: Callable[[float], float], tokens_fp: float) -> float:
    """D with full_precision_tokens(D) = tokens_fp."""
    high = 2.0 * tokens_fp
    for _ in range(DOUBLINGS):
        if full_precision_tokens(high) >= tokens_fp:
            break
        high *= 2
    else:
        raise InputError(
            "trained tokens", tokens_fp, "no number of tokens makes these the optimal full-precision share."
        )
    low = tokens_fp
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if full_precision_tokens(middle) >= tokens_fp else (middle, high)
    return high
