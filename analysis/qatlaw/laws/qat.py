"""The loss law of mixed full-precision and quantization-aware training.

    L = alpha + beta/D^gamma + zeta/N^eta                               full precision (`qatlaw.laws.chinchilla`)
      + theta 2^(-kappa B)                                              irreducible quantization error
      + phi 2^(-chi B) / (N^psi S_qat^omega)                            pure QAT
      + lambda 2^(-mu B) / (N^nu S_fp^xi S_qat^rho)                     interaction of the phases

"Compute-Optimal Quantization-Aware Training", arXiv 2509.22935; the letters of the base are ours. S_fp and S_qat are
the phases' tokens per byte of quantized weights, N B / 8. With one bit width the powers of 2 are constants, and go
into theta, phi and lambda.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.errors import InputError
from qatlaw.laws.base import LawForm, Parameter, PowerTerm, Term, coefficient, exponent
from qatlaw.laws.chinchilla import BASE_PARAMETERS, BASE_TERMS
from qatlaw.laws.points import Floats

SOURCE = "arXiv 2509.22935 (Compute-Optimal Quantization-Aware Training)"

BLOCK = 16_384
"""Plans solved at a time: what a Newton step touches stays in the processor's cache."""
NEWTON_STEPS = 8
TOLERANCE = 1e-9
"""Of logit f, so that f itself is exact to a quarter of it."""


@dataclass(frozen=True)
class SplitForm(LawForm):
    """A law whose quantization error depends on the split by a pure term P and an interaction I."""

    has_fraction: bool = True

    def optimal_fraction(self, theta: ArrayLike, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> Floats:
        """argmin over f of the loss at D_fp = (1-f) D, D_qat = f D; broadcasts, |error| < 1e-6.

        Only P = p f^-omega and I = q f^-rho (1-f)^-xi depend on f. Both are convex in f and their sum grows without
        bound at both ends, so that there is one minimum, inside (0, 1), where the derivative vanishes:

            f / (1-f) = (rho + omega P/I) / xi      [the logarithm of this is solved for logit f]
        """
        v = self.values(theta)
        for name, value in (("N", N), ("D_total", D_total), ("B", B)):
            amounts = np.asarray(value, np.float64)
            if not np.all(np.isfinite(amounts) & (amounts > 0)):
                raise InputError(name, None, "a positive finite number.")
        log_n, log_d, bits = np.log(N), np.log(D_total), np.asarray(B, np.float64)
        log_s = log_d - log_n - np.log(bits / 8)
        # log P/I where both phases had all the tokens; the split's own part is added below.
        c = (
            np.log(v["phi"] / v["lambda"])
            + (v.get("mu", 0.0) - v.get("chi", 0.0)) * np.log(2.0) * bits
            + (v["nu"] - v["psi"]) * log_n
            + (v["xi"] + v["rho"] - v["omega"]) * log_s
        )
        flat = np.ravel(c)
        found = np.empty_like(flat)
        for i in range(0, flat.size, BLOCK):
            found[i : i + BLOCK] = _solve_split(flat[i : i + BLOCK], v["omega"], v["xi"], v["rho"])
        return found.reshape(np.shape(c))


def _solve_split(c: Floats, omega: float, xi: float, rho: float) -> Floats:
    """f with logit f = log((rho + omega P/I) / xi), log P/I = c + (rho - omega) log f + xi log(1-f). c: [n]."""

    def gap_and_slope(x: Floats, c: Floats) -> tuple[Floats, Floats]:
        """At logit f = x: left side minus right side, and its derivative, which is at least 1 - rho > 0."""
        e = np.exp(-np.abs(x))
        f = np.where(x >= 0, 1.0, e) / (1.0 + e)
        log_f = np.minimum(x, 0.0) - np.log1p(e)
        # Cut where the logarithm below is linear to the last digit: no overflow, no other result.
        pure = omega * np.exp(np.minimum(c + (rho - omega) * log_f + xi * (log_f - x), 600.0))
        return x - np.log((rho + pure) / xi), 1.0 + pure / (rho + pure) * ((omega - rho) * (1.0 - f) + xi * f)

    # Where the pure term rules, log f or log(1-f) is nearly logit f or its negative: a start within a step or two.
    alone = c + np.log(omega / xi)
    x = np.maximum(np.log(rho / xi), alone / np.where(alone > 0, 1.0 + xi, 1.0 + omega - rho))
    for _ in range(NEWTON_STEPS):
        gap, slope = gap_and_slope(x, c)
        step = gap / slope
        x = x - step
        if np.max(np.abs(step)) < TOLERANCE:
            break
    else:
        late = np.abs(step) >= TOLERANCE
        low = np.full(np.count_nonzero(late), np.log(rho / xi))
        high = low - gap_and_slope(low, c[late])[0] / (1.0 - rho)
        for _ in range(64):
            middle = (low + high) / 2
            left = gap_and_slope(middle, c[late])[0] > 0
            low, high = np.where(left, low, middle), np.where(left, middle, high)
        x[late] = (low + high) / 2
    return 1.0 / (1.0 + np.exp(-x))


_PHASE_PARAMETERS: tuple[Parameter, ...] = (
    exponent("psi", 1e-4, 1.0, (0.01, 0.4), "how pure QAT error falls with parameters"),
    exponent("omega", 1e-4, 2.0, (0.05, 0.8), "how pure QAT error falls with QAT tokens per byte"),
)
_INTERACTION_PARAMETERS: tuple[Parameter, ...] = (
    exponent("nu", 1e-4, 1.0, (0.01, 0.4), "how the interaction falls with parameters"),
    exponent("xi", 1e-4, 2.0, (0.05, 0.8), "how the interaction falls with full-precision tokens per byte"),
    exponent("rho", 1e-4, 0.95, (0.02, 0.5), "how the interaction falls with QAT tokens per byte"),
)


def _width(name: str, of: str) -> Parameter:
    return exponent(name, 0.02, 4.0, (0.3, 2.0), f"how {of} falls with bits")


_PURE_POWERS = (("psi", "N"), ("omega", "S_qat"))
_INTERACTION_POWERS = (("nu", "N"), ("xi", "S_fp"), ("rho", "S_qat"))
_UNIFIED_TERMS: tuple[Term, ...] = (
    PowerTerm("theta", (("kappa", "2^B"),), quantized_only=True),
    PowerTerm("phi", (("chi", "2^B"), *_PURE_POWERS), quantized_only=True),
    PowerTerm("lambda", (("mu", "2^B"), *_INTERACTION_POWERS), quantized_only=True),
)
_PER_BITS_TERMS: tuple[Term, ...] = (
    PowerTerm("theta", quantized_only=True),
    PowerTerm("phi", _PURE_POWERS, quantized_only=True),
    PowerTerm("lambda", _INTERACTION_POWERS, quantized_only=True),
)
_THETA = coefficient("theta", "factor of the irreducible quantization error")
_PHI = coefficient("phi", "factor of the pure QAT error")
_LAMBDA = coefficient("lambda", "factor of the interaction of the phases")

QAT_UNIFIED = SplitForm(
    name="qat_unified",
    source=SOURCE,
    formula=(
        "alpha + beta/D^gamma + zeta/N^eta + theta 2^(-kappa B) + phi 2^(-chi B)/(N^psi S_qat^omega)"
        " + lambda 2^(-mu B)/(N^nu S_fp^xi S_qat^rho)"
    ),
    parameters=(
        *BASE_PARAMETERS,
        _THETA,
        _width("kappa", "the irreducible error"),
        _PHI,
        _width("chi", "pure QAT error"),
        *_PHASE_PARAMETERS,
        _LAMBDA,
        _width("mu", "the interaction"),
        *_INTERACTION_PARAMETERS,
    ),
    terms=(*BASE_TERMS, *_UNIFIED_TERMS),
)

QAT_PER_BITS = SplitForm(
    name="qat_per_bits",
    source=SOURCE,
    formula="alpha + beta/D^gamma + zeta/N^eta + theta + phi/(N^psi S_qat^omega) + lambda/(N^nu S_fp^xi S_qat^rho)",
    parameters=(*BASE_PARAMETERS, _THETA, _PHI, *_PHASE_PARAMETERS, _LAMBDA, *_INTERACTION_PARAMETERS),
    terms=(*BASE_TERMS, *_PER_BITS_TERMS),
    one_width=True,
)
