"""The closed form of the optimal QAT fraction (arXiv 2509.22935, "Compute-Optimal Quantization-Aware Training").

    f = exp(log S - a / log S) / S = exp(-a / log S),    S = D / (N B / 8),    natural logarithm

The paper's note writes the first form [note]; the second is the same, shortened [ours]. The form is an empirical fit:
trust it inside the range it was fitted on (`extrapolation_warning`) only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.amounts import amount

A = 6.7297
"""The closed form's one fitted constant [note]."""
MEAN_ABSOLUTE_ERROR = 0.091
"""The closed form against the measured optimal fractions [note]."""
MEASURED_S = (35.0, 1e5)
"""Tokens per parameter byte that the ranges of MEASURED span, about [ours]."""
MEASURED = {"S": MEASURED_S, "N": (86e6, 2.2e9), "D": (2.3e9, 1.4e12), "B": (1, 6)}
"""(low, high) of the 757 runs behind it; their bit widths were 1, 2, 4 and 6 [paper]."""

ROUNDING = 0.01
"""The measured ranges have two digits, so a model of 85.9M is one of their 86M [ours]."""


def tokens_per_parameter_byte(N: ArrayLike, D: ArrayLike, B: ArrayLike) -> Any:
    """S = D / (N B / 8) [paper], in tokens per byte: a float for numbers; arrays broadcast.

    N: parameters of the model, a tied embedding counted once. D: tokens. B: bits per quantized weight.
    ValueError where one of them is not a positive finite number.
    """
    for name, value in (("N", N), ("D", D), ("B", B)):
        amounts = np.asarray(value, dtype=np.float64)
        if not np.all(np.isfinite(amounts) & (amounts > 0)):
            raise ValueError(f"{name} = {amounts}: must be a positive finite number")
    S = np.asarray(D, np.float64) / (np.asarray(N, np.float64) * np.asarray(B, np.float64) / 8)
    return S if np.ndim(S) else float(S)


def fraction_at(S: ArrayLike, constant: float = A) -> Any:
    """The optimal QAT fraction exp(-A / ln S) [note], in (0, 1), rising with S: a float for a number, else an array.

    ValueError where S <= 1: the closed form reaches 0 at S = 1 and has no meaning below. Nothing is clipped:
    `extrapolation_warning` says whether the form was measured.
    """
    values = np.asarray(S, dtype=np.float64)
    if not np.all(np.isfinite(values) & (values > 1)):
        shown = f"{values:.3g}" if values.ndim == 0 else f"{values}"
        raise ValueError(
            f"S = {shown} tokens per parameter byte: the closed form of the optimal QAT fraction is defined "
            f"for S > 1 only, and was measured from S = {MEASURED_S[0]:g} on"
        )
    found = np.exp(-constant / np.log(values))
    return found if np.ndim(found) else float(found)


def optimal_fraction(N: ArrayLike, D: ArrayLike, B: ArrayLike) -> Any:
    """The closed form for a model of N parameters, D tokens and B bits; see `fraction_at`. Arrays broadcast."""
    return fraction_at(tokens_per_parameter_byte(N, D, B))


def closed_form(N: float, D: float, B: float) -> float | None:
    """The closed form's fraction of a run; None where it is undefined, or just above S = 1 rounds to 0."""
    S = tokens_per_parameter_byte(N, D, B)
    return (fraction_at(S) or None) if S > 1 else None


def extrapolation_warning(
    N: float, D: float, B: float, measured: Mapping[str, tuple[float, float]] = MEASURED
) -> str | None:
    """One sentence that names all numbers outside the measured ranges, or None."""
    S = tokens_per_parameter_byte(N, D, B)
    low, high = measured["S"]
    outside = beyond({"N": N, "D": D, "B": B}, measured, "measured")
    if not low <= S <= high:
        outside.insert(0, f"S = {S:.4g} tokens per parameter byte (measured about {low:g} to {high:g})")
    if not outside:
        return None
    return f"the optimal QAT fraction is an extrapolation of its closed form: {', '.join(outside)}"


def beyond(values: Mapping[str, ArrayLike], ranges: Mapping[str, tuple[float, float]], source: str) -> list[str]:
    """`N = 3B (SOURCE 86M to 2.2B)` for each value, or `N = 3B to 8B (…)` for an array, outside its range, if it has
    one, but for ROUNDING."""
    outside = []
    for name, value in values.items():
        low, high = ranges.get(name, (0.0, np.inf))
        numbers = np.atleast_1d(np.asarray(value, np.float64))
        wrong = numbers[~((low * (1 - ROUNDING) <= numbers) & (numbers <= high * (1 + ROUNDING)))]
        if len(wrong):
            ends = " to ".join(dict.fromkeys((amount(wrong.min()), amount(wrong.max()))))
            outside.append(f"{name} = {ends} ({source} {amount(low)} to {amount(high)})")
    return outside
