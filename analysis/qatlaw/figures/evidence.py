"""What the figures are drawn from, and what a drawn one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qatlaw.fraction import MEASURED_S, ROUNDING, amount
from qatlaw.laws.base import Law
from qatlaw.laws.points import Floats
from qatlaw.table import MIXED_SCHEMES, RunTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qatlaw.curves import Curve


@dataclass(frozen=True)
class Laws:
    """A law for the figures: one for all bit widths, or one for each."""

    by_width: Mapping[float, Law]
    """Widths that have a law of their own; empty where `unified` serves all."""
    unified: Law | None
    told: str
    """What it is, for captions: 'qat_unified, fitted on these runs'."""
    ranges: Mapping[str, tuple[float, float]]
    """Of the runs behind it: n_params, tokens, bits, s_total, as `RunTable.ranges` has them."""
    scheme: str
    """The two-phase scheme it was fitted on."""
    demonstration: bool = False
    """Its coefficients are made up."""

    def of(self, bits: float) -> Law | None:
        """The law at a bit width; None where there is none."""
        return self.unified or self.by_width.get(bits)

    @property
    def any(self) -> Law:
        return self.unified or next(iter(self.by_width.values()))

    def inside(self, N: Floats | float, D: Floats | float, B: Floats | float) -> NDArray[np.bool_]:
        """Where the law was fitted: sizes, tokens and widths within those of its runs; arrays broadcast."""
        inside = np.ones(np.broadcast_shapes(np.shape(N), np.shape(D), np.shape(B)), dtype=bool)
        for name, values in (("n_params", N), ("tokens", D), ("bits", B)):
            if name in self.ranges:
                low, high = self.ranges[name]
                inside &= (np.asarray(values) >= low * (1 - ROUNDING)) & (np.asarray(values) <= high * (1 + ROUNDING))
        return inside


@dataclass(frozen=True)
class Evidence:
    """Runs and, where there is one, the law."""

    table: RunTable
    laws: Laws | None

    @cached_property
    def scheme(self) -> str | None:
        """The two-phase scheme that U-curves are drawn of: the law's, else the one with more runs; None without any."""
        if self.laws is not None:
            return self.laws.scheme
        counts = self.table.frame["scheme"].value_counts()
        found = [name for name in MIXED_SCHEMES if counts.get(name, 0)]
        return max(found, key=lambda name: int(counts[name])) if found else None

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """The measured U-curves of `scheme`, those of three fractions or more."""
        from qatlaw.curves import measured_curves

        return tuple(measured_curves(self.table.of_scheme(self.scheme))) if self.scheme else ()

    def losses(self, scheme: str, N: float, D: float, B: float | None = None) -> Floats:
        """Of the runs of one cell, over their seeds and fractions; of any width where B is None."""
        return self._cells.get((scheme, N, D, B), np.array([]))

    @cached_property
    def _cells(self) -> dict[tuple[str, float, float, float | None], Floats]:
        frame = self.table.frame.assign(D=self.table.tokens_total)
        found: dict[tuple[str, float, float, float | None], Floats] = {}
        for (scheme, N, D), rows in frame.groupby(["scheme", "n_params", "D"]):
            found[scheme, N, D, None] = rows["loss"].to_numpy(np.float64)
            for B, own in rows.groupby("bits"):
                found[scheme, N, D, B] = own["loss"].to_numpy(np.float64)
        return found

    @cached_property
    def cells(self) -> tuple[tuple[float, float], ...]:
        """(N, D) of the table's runs, by rising tokens per parameter."""
        pairs = zip(self.table.column("n_params").tolist(), self.table.tokens_total.tolist(), strict=True)
        return tuple(sorted(set(pairs), key=lambda pair: (pair[1] / pair[0], pair)))

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """Bit widths of its runs, those of post-training quantization among them."""
        return tuple(sorted(set(self.rows("sequential", "fused", "scratch", "ptq").column("bits").tolist())))

    def rows(self, *schemes: str) -> RunTable:
        return self.table.where(self.table.frame["scheme"].isin(schemes).to_numpy())

    @cached_property
    def law_told(self) -> str:
        """For captions."""
        if self.laws is None:
            return ""
        made_up = " Its coefficients are made up for demonstration: no run was measured for them."
        return f"The law is {self.laws.told}.{made_up if self.laws.demonstration else ''}"


@dataclass(frozen=True)
class Drawn:
    """A figure of the report, or why there is none."""

    name: str
    """Of its files."""
    title: str
    caption: str
    """What is measured, what is law, units, ranges."""
    figure: Figure | None = None
    lacking: str = ""
    """What it would need, where `figure` is None."""
    warnings: tuple[str, ...] = ()
    """Extrapolation and other things to know before trusting it."""


def amounts_told(values: Floats) -> str:
    """'86M to 2.2B', or '86M' alone."""
    low, high = amount(float(np.min(values))), amount(float(np.max(values)))
    return low if low == high else f"{low} to {high}"


def closed_form_warnings(table: RunTable) -> tuple[str, ...]:
    """Of quantized runs: how many of them lie where the closed form was not measured."""
    S = table.tokens_total / (table.column("n_params") * table.column("bits") / 8)
    low, high = MEASURED_S
    outside = int(np.count_nonzero((low > S) | (high < S)))
    if not outside:
        return ()
    return (
        f"{outside} of {len(S)} runs lie outside of S = {low:g} to {high:g} tokens per parameter byte (theirs: "
        f"{np.min(S):.3g} to {np.max(S):.3g}): the closed form is an extrapolation there.",
    )
