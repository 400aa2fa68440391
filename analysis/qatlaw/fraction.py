"""The closed form of the optimal QAT fraction (arXiv 2509.22935, "Compute-Optimal Quantization-Aware Training").

    f = exp(log S - a / log S) / S = exp(-a / log S),    S = D / (N B / 8),    natural logarithm

The first form is how the paper's note writes it [note], the second is the same thing, shortened [ours]. It is an
empirical fit: trust it inside the range it was fitted on (`is_extrapolated`), and only there.
"""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

A = 6.7297
"""The closed form's one fitted constant [note]."""
MEAN_ABSOLUTE_ERROR = 0.091
"""Of the closed form against the measured optimal fractions [note]."""
MEASURED_PARAMETERS = (86e6, 2.2e9)
"""Model sizes of the 757 runs behind it [paper]."""
MEASURED_TOKENS = (2.3e9, 1.4e12)
"""Their token counts [paper]."""
MEASURED_BITS = (1, 6)
"""Their bit widths were 1, 2, 4 and 6 [paper]."""
MEASURED_S = (35.0, 1e5)
"""Tokens per parameter byte that those ranges span, about [ours]."""

ROUNDING = 0.01
"""The measured ranges are told in two digits, so a model of 85.9M is one of their 86M [ours]."""

Floats = NDArray[np.float64]


@overload
def tokens_per_parameter_byte(N: float, D: float, B: float) -> float: ...
@overload
def tokens_per_parameter_byte(N: ArrayLike, D: ArrayLike, B: ArrayLike) -> float | Floats: ...
def tokens_per_parameter_byte(N: ArrayLike, D: ArrayLike, B: ArrayLike) -> float | Floats:
    """S = D / (N B / 8) [paper], in tokens per byte.

    N: parameters of the model, a tied embedding counted once. D: tokens. B: bits per quantized weight.
    Numbers give a float; arrays broadcast. ValueError where one of them is not a positive finite number.
    """
    for name, value in (("N", N), ("D", D), ("B", B)):
        amounts = np.asarray(value, dtype=np.float64)
        if not np.all(np.isfinite(amounts) & (amounts > 0)):
            raise ValueError(f"{name} = {_told(amounts)}: must be a positive finite number")
    return _plain(np.asarray(D, np.float64) / (np.asarray(N, np.float64) * np.asarray(B, np.float64) / 8))


@overload
def optimal_fraction(S: float) -> float: ...
@overload
def optimal_fraction(S: ArrayLike) -> float | Floats: ...
def optimal_fraction(S: ArrayLike) -> float | Floats:
    """The optimal QAT fraction exp(-A / ln S) [note], in (0, 1), rising with S.

    A number gives a float, an array an array. ValueError where S <= 1: at S = 1 the closed form reaches 0, below it has
    no meaning. Nothing is clipped; whether S lies where the form was measured is `is_extrapolated`'s to say.
    """
    values = np.asarray(S, dtype=np.float64)
    if not np.all(np.isfinite(values) & (values > 1)):
        raise ValueError(
            f"S = {_told(values)} tokens per parameter byte: the closed form of the optimal QAT fraction is defined "
            f"for S > 1 only, and was measured from S = {MEASURED_S[0]:g} on"
        )
    return _plain(np.exp(-A / np.log(values)))


def is_extrapolated(S: float) -> bool:
    """Whether S lies outside the range the closed form was measured on."""
    return not MEASURED_S[0] <= S <= MEASURED_S[1]


def extrapolation_warning(N: float, D: float, B: float) -> str | None:
    """One sentence naming all that lies outside the measured ranges, or None where nothing does."""
    S = tokens_per_parameter_byte(N, D, B)
    outside = []
    if is_extrapolated(S):
        outside.append(f"S = {S:.4g} tokens per parameter byte (measured about {MEASURED_S[0]:g} to {MEASURED_S[1]:g})")
    for name, value, (low, high) in (
        ("N", N, MEASURED_PARAMETERS),
        ("D", D, MEASURED_TOKENS),
        ("B", B, MEASURED_BITS),
    ):
        if not low * (1 - ROUNDING) <= value <= high * (1 + ROUNDING):
            outside.append(f"{name} = {amount(value)} (measured {amount(low)} to {amount(high)})")
    if not outside:
        return None
    return f"the optimal QAT fraction is an extrapolation of its closed form: {', '.join(outside)}"


def amount(value: float, digits: int = 3) -> str:
    """Some digits and a suffix: 2300000000.0 -> 2.3B."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= unit * (1 - 0.5 * 10.0**-digits):  # 999,999 is 1M
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def _plain(values: Floats | np.float64) -> float | Floats:
    return float(values) if np.ndim(values) == 0 else np.asarray(values)


def _told(values: Floats) -> str:
    """For an error: a number in three digits, an array as it is."""
    return f"{values:.3g}" if np.ndim(values) == 0 else str(values)
