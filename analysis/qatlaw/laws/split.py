"""Laws whose quantization error depends on the split of the tokens, and the fraction that minimises it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.errors import InputError
from qatlaw.laws.base import Floats, LawForm

MOST_STEPS = 100
TOLERANCE = 1e-9
"""In logit f, so that f itself is exact to a quarter of it."""


@dataclass(frozen=True)
class SplitForm(LawForm):
    """A law with a pure QAT term P and an interaction I of the phases."""

    has_fraction: bool = True

    def optimal_fraction(self, theta: ArrayLike, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> Floats:
        """argmin over f of the loss at D_fp = (1-f) D, D_qat = f D; broadcasts, |error| < 1e-6.

        Only P = p f^-omega and I = q f^-rho (1-f)^-xi depend on f. Both are convex in f and their sum grows without
        bound at both ends. So one minimum lies inside (0, 1), where the derivative vanishes:

            f / (1-f) = (rho + omega P/I) / xi      [its logarithm is solved for logit f]
        """
        v = self.values(theta)
        for name, value in (("N", N), ("D_total", D_total), ("B", B)):
            amounts = np.asarray(value, np.float64)
            if not np.all(np.isfinite(amounts) & (amounts > 0)):
                raise InputError(name, None, "is not a positive finite number.")
        log_n, log_d, bits = np.log(N), np.log(D_total), np.asarray(B, np.float64)
        log_s = log_d - log_n - np.log(bits / 8)
        # log P/I where both phases had all the tokens; `_solve` adds the part of the split.
        c = (
            np.log(v["phi"] / v["lambda"])
            + (v.get("mu", 0.0) - v.get("chi", 0.0)) * np.log(2.0) * bits
            + (v["nu"] - v["psi"]) * log_n
            + (v["xi"] + v["rho"] - v["omega"]) * log_s
        )
        return _solve(np.asarray(c, np.float64), v["omega"], v["xi"], v["rho"])


def _solve(c: Floats, omega: float, xi: float, rho: float) -> Floats:
    """f with logit f = log((rho + omega P/I) / xi), log P/I = c + (rho - omega) log f + xi log(1-f).

    Newton's method, held inside a bracket by bisection.
    """

    def gap_and_slope(x: Floats) -> tuple[Floats, Floats]:
        """At logit f = x: left side minus right side, and its derivative, which is at least 1 - rho > 0."""
        e = np.exp(-np.abs(x))
        f = np.where(x >= 0, 1.0, e) / (1.0 + e)
        log_f = np.minimum(x, 0.0) - np.log1p(e)
        # Cut where the logarithm below is linear to the last digit, so that nothing overflows.
        pure = omega * np.exp(np.minimum(c + (rho - omega) * log_f + xi * (log_f - x), 600.0))
        return x - np.log((rho + pure) / xi), 1.0 + pure / (rho + pure) * ((omega - rho) * (1.0 - f) + xi * f)

    low = np.full(c.shape, np.log(rho / xi))
    high = low - gap_and_slope(low)[0] / (1.0 - rho)
    # Where P dominates, log f or log(1-f) is nearly logit f or its negative: the start is a step or two away.
    alone = c + np.log(omega / xi)
    x = np.clip(alone / np.where(alone > 0, 1.0 + xi, 1.0 + omega - rho), low, high)
    for _ in range(MOST_STEPS):
        gap, slope = gap_and_slope(x)
        low, high = np.where(gap > 0, low, x), np.where(gap > 0, x, high)
        newton = x - gap / slope
        following = np.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        change = np.abs(following - x)
        x = following
        if np.max(change, initial=0.0) < TOLERANCE:
            break
    return 1.0 / (1.0 + np.exp(-x))
