"""Published laws of low-precision training to compare against, on the same runs. Their coefficients are fitted here.

Neither knows two phases. Both are applied to a mixed run by its total tokens, so that every split of the same tokens is
predicted alike and there is no optimal fraction: what such a law misses is what a split is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qatlaw.laws.base import LawForm, PowerTerm, coefficient, exponent
from qatlaw.laws.chinchilla import BASE_PARAMETERS, BASE_TERMS
from qatlaw.laws.points import Floats, Points

CHEN_2025 = LawForm(
    name="chen_2025",
    source="Chen et al. 2025, arXiv 2505.14302 (Scaling Law for Quantization-Aware Training)",
    formula="alpha + beta/D^gamma + zeta/N^eta + k D^gamma_D / N^gamma_N",
    parameters=(
        *BASE_PARAMETERS,
        coefficient("k", "factor of the quantization error"),
        exponent("gamma_D", 1e-4, 1.0, (0.01, 0.4), "how the quantization error rises with tokens"),
        exponent("gamma_N", 1e-4, 1.5, (0.05, 0.6), "how the quantization error falls with parameters"),
    ),
    terms=(*BASE_TERMS, PowerTerm("k", (("gamma_D", "1/D"), ("gamma_N", "N")), quantized_only=True)),
    one_width=True,
)
"""QAT from scratch. The quantization error there is k D^gamma_D (log2 G)^gamma_G / N^gamma_N with G the group size,
fitted once per precision: bits are no variable of it. Runs here have one G, whose factor goes into k."""


@dataclass(frozen=True)
class EffectiveSizeTerm:
    """zeta / N_eff^eta with N_eff = N (1 - e^(-B / gamma_w)); N_eff = N for full-precision runs."""

    coefficient: str = "zeta"
    exponents: tuple[str, ...] = ("eta", "gamma_w")
    features: tuple[str, ...] = ("N", "2^B")
    quantized_only: bool = False

    def log_shape(self, values: Mapping[str, float], points: Points) -> Floats:
        return -values["eta"] * self._log_size(values["gamma_w"], points)

    def slopes(self, values: Mapping[str, float], points: Points) -> dict[str, Floats]:
        ratio = points.bits / values["gamma_w"]
        # d log(1 - e^-ratio) / d gamma_w; e^-ratio/(1-e^-ratio), written without an overflow at many bits.
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
        *BASE_PARAMETERS,
        exponent("gamma_w", 0.05, 50.0, (0.5, 5.0), "bits at which weights have lost 1/e of their count"),
    ),
    terms=(*BASE_TERMS[:2], EffectiveSizeTerm()),
)
"""Precision as fewer effective parameters; activations and the KV cache stay in full precision here."""
