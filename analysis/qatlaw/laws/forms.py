"""The loss laws: full precision, the law of two phases, and two published rivals. All coefficients are fitted here.

The law of mixed full-precision and quantization-aware training is

    L = alpha + beta/D^gamma + zeta/N^eta                               full precision
      + theta 2^(-kappa B)                                              irreducible quantization error
      + phi 2^(-chi B) / (N^psi S_qat^omega)                            pure QAT
      + lambda 2^(-mu B) / (N^nu S_fp^xi S_qat^rho)                     interaction of the phases

"Compute-Optimal Quantization-Aware Training", arXiv 2509.22935. S_fp and S_qat are the phases' tokens per byte of
quantized weights, N B / 8. With one bit width the powers of 2 are constants, and become part of theta, phi and lambda.

The full-precision part is that of Hoffmann et al. 2022 (theirs: E, B, beta, A, alpha); its letters are ours. The rivals
know one phase only. They see a mixed run by its total tokens, so they predict the same loss for every split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qatlaw.laws.base import Floats, LawForm, Parameter, Points, Term, coefficient, exponent
from qatlaw.laws.split import SplitForm

_BASE = (
    coefficient("alpha", "loss that neither data nor size removes"),
    coefficient("beta", "factor of the data term"),
    exponent("gamma", 0.02, 2.0, (0.2, 0.8), "how the loss falls with tokens"),
    coefficient("zeta", "factor of the size term"),
    exponent("eta", 0.02, 2.0, (0.2, 0.8), "how the loss falls with parameters"),
)
_BASE_TERMS = (Term("alpha"), Term("beta", (("gamma", "D"),)), Term("zeta", (("eta", "N"),)))

CHINCHILLA = LawForm(
    name="chinchilla",
    source="Hoffmann et al. 2022, arXiv 2203.15556",
    formula="alpha + beta/D^gamma + zeta/N^eta",
    parameters=_BASE,
    terms=_BASE_TERMS,
    quantized=False,
)


def _in_bits(name: str, of: str) -> Parameter:
    return exponent(name, 0.02, 4.0, (0.3, 2.0), f"how {of} falls with bits")


QAT_UNIFIED = SplitForm(
    name="qat_unified",
    source="arXiv 2509.22935 (Compute-Optimal Quantization-Aware Training)",
    formula=(
        "alpha + beta/D^gamma + zeta/N^eta + theta 2^(-kappa B) + phi 2^(-chi B)/(N^psi S_qat^omega)"
        " + lambda 2^(-mu B)/(N^nu S_fp^xi S_qat^rho)"
    ),
    parameters=(
        *_BASE,
        coefficient("theta", "factor of the irreducible quantization error"),
        _in_bits("kappa", "the irreducible error"),
        coefficient("phi", "factor of the pure QAT error"),
        _in_bits("chi", "pure QAT error"),
        exponent("psi", 1e-4, 1.0, (0.01, 0.4), "how pure QAT error falls with parameters"),
        exponent("omega", 1e-4, 2.0, (0.05, 0.8), "how pure QAT error falls with QAT tokens per byte"),
        coefficient("lambda", "factor of the interaction of the phases"),
        _in_bits("mu", "the interaction"),
        exponent("nu", 1e-4, 1.0, (0.01, 0.4), "how the interaction falls with parameters"),
        exponent("xi", 1e-4, 2.0, (0.05, 0.8), "how the interaction falls with full-precision tokens per byte"),
        exponent("rho", 1e-4, 0.95, (0.02, 0.5), "how the interaction falls with QAT tokens per byte"),
    ),
    terms=(
        *_BASE_TERMS,
        Term("theta", (("kappa", "2^B"),), quantized_only=True),
        Term("phi", (("chi", "2^B"), ("psi", "N"), ("omega", "S_qat")), quantized_only=True),
        Term("lambda", (("mu", "2^B"), ("nu", "N"), ("xi", "S_fp"), ("rho", "S_qat")), quantized_only=True),
    ),
)

QAT_PER_BITS = replace(
    QAT_UNIFIED,
    name="qat_per_bits",
    formula="alpha + beta/D^gamma + zeta/N^eta + theta + phi/(N^psi S_qat^omega) + lambda/(N^nu S_fp^xi S_qat^rho)",
    parameters=tuple(one for one in QAT_UNIFIED.parameters if one.name not in ("kappa", "chi", "mu")),
    terms=tuple(
        replace(term, powers=tuple(power for power in term.powers if power[1] != "2^B")) for term in QAT_UNIFIED.terms
    ),
    one_width=True,
)

CHEN_2025 = LawForm(
    name="chen_2025",
    source="Chen et al. 2025, arXiv 2505.14302 (Scaling Law for Quantization-Aware Training)",
    formula="alpha + beta/D^gamma + zeta/N^eta + k D^gamma_D / N^gamma_N",
    parameters=(
        *_BASE,
        coefficient("k", "factor of the quantization error"),
        exponent("gamma_D", 1e-4, 1.0, (0.01, 0.4), "how the quantization error rises with tokens"),
        exponent("gamma_N", 1e-4, 1.5, (0.05, 0.6), "how the quantization error falls with parameters"),
    ),
    terms=(*_BASE_TERMS, Term("k", (("gamma_D", "1/D"), ("gamma_N", "N")), quantized_only=True)),
    one_width=True,
)
"""QAT from scratch. Its quantization error is k D^gamma_D (log2 G)^gamma_G / N^gamma_N with G the group size, fitted
once per precision. Runs here have one G, whose factor becomes part of k."""


@dataclass(frozen=True)
class _EffectiveSize(Term):
    """zeta / N_eff^eta with N_eff = N (1 - e^(-B / gamma_w)); N_eff = N for full-precision runs."""

    def log_shape(self, values: Mapping[str, float], points: Points) -> Floats:
        return -values["eta"] * self._log_size(values["gamma_w"], points)

    def slopes(self, values: Mapping[str, float], points: Points) -> dict[str, Floats]:
        ratio = points.bits / values["gamma_w"]
        # d log(1 - e^-ratio) / d gamma_w, written without an overflow at many bits.
        slope = -np.exp(-ratio) / -np.expm1(-ratio) * ratio / values["gamma_w"]
        return {
            "eta": -self._log_size(values["gamma_w"], points),
            "gamma_w": -values["eta"] * np.where(points.quantized, slope, 0.0),
        }

    @staticmethod
    def _log_size(gamma_w: float, points: Points) -> Floats:
        shrunk = np.log(-np.expm1(-points.bits / gamma_w))
        return points.log["N"] + np.where(points.quantized, shrunk, 0.0)


KUMAR_2024 = LawForm(
    name="kumar_2024",
    source="Kumar et al. 2024, arXiv 2411.04330 (Scaling Laws for Precision): weights trained in low precision",
    formula="alpha + beta/D^gamma + zeta/(N (1 - e^(-B/gamma_w)))^eta",
    parameters=(
        *_BASE,
        exponent("gamma_w", 0.05, 50.0, (0.5, 5.0), "bits at which weights have lost 1/e of their count"),
    ),
    terms=(*_BASE_TERMS[:2], _EffectiveSize("zeta", (("eta", "N"), ("gamma_w", "2^B")))),
)
"""Precision as fewer effective parameters; activations and the KV cache stay in full precision here."""

FORMS: dict[str, LawForm] = {form.name: form for form in (CHINCHILLA, QAT_UNIFIED, QAT_PER_BITS, CHEN_2025, KUMAR_2024)}
