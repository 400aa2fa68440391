"""From a model size, a token budget and a bit width to the split of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

from qatlaw.fraction import extrapolation_warning, optimal_fraction, tokens_per_parameter_byte


@dataclass(frozen=True)
class FractionPlan:
    """How a run of `tokens` should be split, by the closed form. tokens_fp + tokens_qat = tokens, exactly."""

    params: int
    tokens: int
    bits: float
    S: float
    """Tokens per parameter byte."""
    fraction: float
    """QAT's share of the tokens, before it is rounded to whole tokens (here) or optimizer steps (in a run)."""
    tokens_fp: int
    tokens_qat: int
    warnings: tuple[str, ...]
    """What a reader must know before trusting the fraction; empty inside the measured range."""
    overrides: tuple[str, ...]
    """`key=value` settings that put the plan into a recipe. The scheme is the classic sequential one."""


def plan_fraction(params: float, tokens: float, bits: float) -> FractionPlan:
    """The plan for a model of `params` parameters (a tied embedding counted once), `tokens` tokens and `bits` bits.

    ValueError where an amount is not positive, or where S <= 1 (see `optimal_fraction`).
    """
    S = tokens_per_parameter_byte(params, tokens, bits)
    fraction = optimal_fraction(S)
    params, tokens = round(params), round(tokens)
    tokens_qat = round(fraction * tokens)
    warning = extrapolation_warning(params, tokens, bits)
    return FractionPlan(
        params=params,
        tokens=tokens,
        bits=bits,
        S=S,
        fraction=fraction,
        tokens_fp=tokens - tokens_qat,
        tokens_qat=tokens_qat,
        warnings=(warning,) if warning else (),
        overrides=(f"tokens={tokens}", f"qat.bits={bits:g}", "qat.scheme=sequential", f"qat.fraction={fraction:.4g}"),
    )
