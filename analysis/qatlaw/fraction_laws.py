"""Laws of the optimal fraction alone: the paper's closed form, and what this project's ladder measured in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qatlaw.bit_widths import BIT_WIDTHS, bits_label
from qatlaw.errors import InputError
from qatlaw.fraction import MEASURED, A, extrapolation_warning, fraction_at, tokens_per_parameter_byte


@dataclass(frozen=True)
class FractionLaw:
    """f = exp(-A / ln S), perhaps with an A for each bit width. It has fractions, and no losses."""

    name: str
    source: str
    measured: Mapping[str, tuple[float, float]]
    """(low, high) of N, D, B and S."""
    constants: Mapping[float, tuple[float, float, float]] = field(default_factory=dict)
    """(A, low, high) by bit width, with the ends of its 95 % interval; empty: the paper's A for all."""
    law = None
    synthetic = False

    def optimal_fraction(self, N: float, D: float, B: float) -> float:
        """InputError where the width was not measured, and where S <= 1 (see `fraction_at`)."""
        self.check_bits(B)
        constant, *_ = self.constants.get(B, (A,))
        try:
            return float(fraction_at(tokens_per_parameter_byte(N, D, B), constant))
        except ValueError as error:
            units = "Are --params and --tokens in the right units (396M, 100B)?"
            raise InputError("plan", None, f"{error}.", units) from None

    @property
    def widths(self) -> tuple[float, ...]:
        return tuple(self.constants) or BIT_WIDTHS

    @property
    def about(self) -> str:
        """What stands behind it, in words."""
        constants = (
            f"{A:g} (95 %: {low:g} to {high:g}) at {bits_label(bits)}"
            for bits, (A, low, high) in self.constants.items()
        )
        return f"f = exp(-A / ln S), S = tokens per parameter byte, with A = {', '.join(constants)}; {self.source}"

    def check_bits(self, bits: float) -> None:
        if self.constants and bits not in self.constants:
            known = ", ".join(f"{width:g}" for width in self.constants)
            problem = f"was not measured by {self.name}, which has {known} bits."
            raise InputError("--bits", bits, problem, "Ask for one of them, or leave --law out.")

    def warning(self, N: float, D: float, B: float) -> str | None:
        """Names all numbers outside the measured ranges; None where all lie inside."""
        return extrapolation_warning(N, D, B, self.measured)


PAPER = FractionLaw("closed form", "arXiv 2509.22935", MEASURED)
LADDER = FractionLaw(
    name="ladder-1to1000",
    source="analysis/studies/ladder-1to1000, this project's own runs at a thousandth of the paper's scale, sequential",
    measured={"N": (86_304, 763_104), "D": (2.3e6, 18.4e6), "B": (1, 4), "S": (6, 1706)},
    constants={1.0: (0.58, 0.44, 0.67), 2.0: (6.26, 0.45, 7.07), 4.0: (13.4, 12.5, 14.6)},
)
"""The constants are `closed_form_constant` of its U-curves, in the study's tables.py."""
FRACTION_LAWS = {LADDER.name: LADDER}
LADDER_FOUND = (
    "The closed form is the paper's. In sequential runs at a thousandth of its scale (--law ladder-1to1000) its "
    "fractions cost 0.005 nats at 2 bits, 0.045 at 1 bit (best: f = 0.9) and 0.016 at 4 bits (best: 0.02 to 0.07), on "
    "average."
)
"""What the 1:1000 ladder says of the closed form."""
