"""Question 5: the QAT tokens that full-precision tokens deserve, which are spent already.

Every further QAT token lowers the loss, so none is the last. The QAT tokens that D_fp tokens *deserve* [ours] make the
entire run token-optimal: D with (1 - f*(D)) D = D_fp, and D_qat = D - D_fp. With fewer, the full-precision tokens were
too many; more would have been better spent before the switch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qatlaw.amounts import exact_amount
from qatlaw.bit_widths import bits_label
from qatlaw.errors import InputError
from qatlaw.fraction import tokens_per_parameter_byte
from qatlaw.fraction_laws import PAPER
from qatlaw.plan.root import falling_root
from qatlaw.plan.run import warnings_of, written_fraction
from qatlaw.planner_law import PlanLaw

MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the deserved tokens, for the table of what they buy."""
DOUBLINGS = 60
STEP = 1e-4
"""In log tokens, for the slope of the loss."""


@dataclass(frozen=True)
class Purchase:
    """What some number of QAT tokens buys."""

    tokens_qat: int
    multiple: float
    """Over the deserved ones."""
    fraction: float
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
    purchases: tuple[Purchase, ...]
    loss: float | None
    """With the deserved tokens; None without a law."""
    full_precision_loss: float | None
    """Loss of a finished full-precision run of tokens_fp; None without a law."""
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
        return (f"tokens={exact_amount(self.tokens)}", f"qat.bits={self.bits:g}", f"qat.fraction={text}")


def plan_checkpoint(params: float, bits: float, tokens_fp: float, *, law: PlanLaw = PAPER) -> CheckpointPlan:
    """QAT tokens for a checkpoint that saw `tokens_fp` full-precision tokens.

    InputError where no number of tokens makes them the optimal share.
    """
    law.check_bits(bits)

    def excess(D: float) -> float:
        """Full-precision tokens of an optimal run of D tokens, beyond those that exist."""
        defined = law.law is not None or tokens_per_parameter_byte(params, D, bits) > 1
        f = law.optimal_fraction(params, D, bits) if defined else 0.0
        return (1 - f) * D - tokens_fp

    ends = (tokens_fp * 2.0**n for n in range(1, DOUBLINGS + 1))
    high = next((D for D in ends if excess(D) >= 0), None)
    if high is None:
        problem = "are the optimal full-precision share of no number of tokens."
        raise InputError("trained tokens", tokens_fp, problem)
    deserved = float(falling_root(lambda D: -excess(float(D)), tokens_fp, high)) - tokens_fp
    if law.law is None and tokens_per_parameter_byte(params, tokens_fp + deserved, bits) <= 1:
        problem = f"is less than a token per byte of {params:g} parameters at {bits_label(bits)}, too few here."
        raise InputError("trained tokens", tokens_fp, problem, "Are --params and the tokens in the right units?")

    def loss(q: float) -> float | None:
        return None if law.law is None else float(law.law.loss(params, tokens_fp, q, bits))

    purchases = []
    for multiple in MULTIPLES:
        q = multiple * deserved
        more, less = loss(q * np.exp(STEP)), loss(q * np.exp(-STEP))
        slope = None if more is None or less is None else (more - less) / (2 * STEP) / q * 1e9
        purchases.append(Purchase(round(q), multiple, q / (tokens_fp + q), loss(q), slope))
    return CheckpointPlan(
        params=round(params), bits=bits, tokens_fp=round(tokens_fp), tokens_qat=round(deserved),
        purchases=tuple(purchases),
        loss=loss(deserved), full_precision_loss=loss(0.0),
        warnings=warnings_of(params, tokens_fp + deserved, bits, law),
    )  # fmt: skip
