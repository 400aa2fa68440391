"""The loss law that a plan is made by, with the range of its runs.

No law has been fitted on runs of this project yet, so `default_law()` is None and plans go by the closed form of the
optimal fraction, which knows no losses. A fit of one's own is given as its fit.json. The synthetic law is there for
demonstrations, and every output that stands on it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qatlaw.errors import LawError
from qatlaw.fraction import ROUNDING, amount, tokens_per_parameter_byte
from qatlaw.laws.base import Law

if TYPE_CHECKING:
    from qatlaw.intervals import Bootstrap

SYNTHETIC = "synthetic"
SYNTHETIC_WARNING = "every prediction here is of a made-up law, for demonstration: plan nothing by it"


@dataclass(frozen=True)
class PlannerLaw:
    """A law with what a reader of a plan has to know of it."""

    law: Law
    source: str
    """Where it comes from, in words."""
    range: Mapping[str, tuple[float, float]]
    """(low, high) of the runs behind it: n_params, tokens, bits, s_total; what is missing is not known."""
    synthetic: bool = False
    """Made up, or fitted on made-up runs: a demonstration."""
    bootstrap: Bootstrap | None = None
    """Resampled laws, for intervals."""
    sizes: tuple[float, ...] = ()
    """N of the runs behind it; empty where they are not known."""

    def warning(self, N: float, D: float, B: float | None = None) -> str | None:
        """One sentence naming what of the plan lies outside the range of the law's runs; None where nothing does.

        B: bits; None for a full-precision run, whose bits mean nothing.
        """
        amounts = {"n_params": ("N", N), "tokens": ("D", D)}
        if B is not None:
            amounts |= {"bits": ("B", B), "s_total": ("S", tokens_per_parameter_byte(N, D, B))}
        outside = []
        for key, (symbol, value) in amounts.items():
            low, high = self.range.get(key, (0.0, float("inf")))
            if not low * (1 - ROUNDING) <= value <= high * (1 + ROUNDING):
                outside.append(f"{symbol} = {amount(value)} (its runs: {amount(low)} to {amount(high)})")
        told = [f"the loss law is extrapolated: {', '.join(outside)}"] if outside else []
        if len(self.sizes) == 2 and all(abs(N / size - 1) > ROUNDING for size in self.sizes):
            known = " and ".join(map(amount, self.sizes))
            told.append(f"runs of two sizes ({known}) do not determine losses at another: trust the fractions alone")
        return "; ".join(told) or None

    def check_bits(self, bits: float) -> None:
        """LawError where a law of one bit width is asked about another."""
        low, high = self.range.get("bits", (0.0, float("inf")))
        if self.law.form.one_width and not low <= bits <= high:
            raise LawError(
                "--bits", bits, f"{self.source} is a law of {low:g} bits alone.", "Ask for those, or give another law."
            )


def default_law() -> PlannerLaw | None:
    """The law that ships with this package, once it is fitted on runs of this project: none so far.

    Shipping one changes what `qat.fraction=auto` means in a recipe.
    """
    return None


def load_law(name: str) -> PlannerLaw:
    """The law of a fit.json, or `synthetic`. LawError for what is neither, and for laws without an optimal fraction."""
    if name == SYNTHETIC:
        return synthetic_law()
    from qatlaw.fit_file import read_fit

    try:
        file = read_fit(name)
    except LawError as error:
        raise LawError("--law", name, error.allowed, error.do) from error
    if not file.law.form.has_fraction:
        raise LawError(
            "--law",
            name,
            f"{file.law.form.name} does not depend on how the tokens are split, so it plans no switch.",
            "Fit qat_unified or qat_per_bits.",
        )
    return PlannerLaw(
        law=file.law,
        source=f"{file.law.form.name} fitted on {file.data['runs']} runs of {file.data['source']}",
        range=file.range,
        synthetic=bool(file.data.get("synthetic")),
        bootstrap=file.bootstrap,
        sizes=tuple(file.data.get("sizes", ())),
    )


def synthetic_law() -> PlannerLaw:
    """For demonstrations; its range is the one it was made for."""
    from qatlaw import fraction, synthetic

    ranges = {
        "n_params": fraction.MEASURED_PARAMETERS,
        "tokens": fraction.MEASURED_TOKENS,
        "bits": fraction.MEASURED_BITS,
        "s_total": fraction.MEASURED_S,
    }
    return PlannerLaw(synthetic.law(), "synthetic, fitted on no runs", ranges, synthetic=True)
