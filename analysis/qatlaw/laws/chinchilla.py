"""The full-precision law every other one stands on.

    L = alpha + beta / D^gamma + zeta / N^eta

Hoffmann et al. 2022 (arXiv 2203.15556), with the letters of the QAT law (theirs: E, B, beta, A, alpha).
"""

from __future__ import annotations

from qatlaw.laws.base import LawForm, Parameter, PowerTerm, Term, coefficient, exponent

BASE_PARAMETERS: tuple[Parameter, ...] = (
    coefficient("alpha", "loss that neither data nor size removes"),
    coefficient("beta", "factor of the data term"),
    exponent("gamma", 0.02, 2.0, (0.2, 0.8), "how the loss falls with tokens"),
    coefficient("zeta", "factor of the size term"),
    exponent("eta", 0.02, 2.0, (0.2, 0.8), "how the loss falls with parameters"),
)

BASE_TERMS: tuple[Term, ...] = (
    PowerTerm("alpha"),
    PowerTerm("beta", (("gamma", "D"),)),
    PowerTerm("zeta", (("eta", "N"),)),
)

CHINCHILLA = LawForm(
    name="chinchilla",
    source="Hoffmann et al. 2022, arXiv 2203.15556",
    formula="alpha + beta/D^gamma + zeta/N^eta",
    parameters=BASE_PARAMETERS,
    terms=BASE_TERMS,
    quantized=False,
)
