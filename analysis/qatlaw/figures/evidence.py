"""The data that figures are drawn from, and a drawn figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qatlaw.fraction import MEASURED_S, ROUNDING
from qatlaw.laws.base import Floats, Law
from qatlaw.runs import RunRecord
from qatlaw.table import MIXED_SCHEMES, RunTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qatlaw.curves import Curve


@dataclass(frozen=True)
class Laws:
    """A law for the figures: one for all bit widths, or one for each."""

    by_width: Mapping[float | None, Law]
    """Key None: the law of all widths."""
    source: str
    """For captions: 'qat_unified, fitted on these runs'."""
    ranges: Mapping[str, tuple[float, float]]
    """Ranges of the runs behind it, as in `RunTable.ranges`."""
    scheme: str
    demonstration: bool = False

    def inside(self, N: Floats | float, D: Floats | float, B: Floats | float) -> NDArray[np.bool_]:
        """Whether sizes, tokens and widths lie within those of the law's runs; arrays broadcast."""
        inside = np.ones(np.broadcast_shapes(np.shape(N), np.shape(D), np.shape(B)), dtype=bool)
        for name, values in (("n_params", N), ("tokens", D), ("bits", B)):
            if name in self.ranges:
                low, high = self.ranges[name]
                inside &= (np.asarray(values) >= low * (1 - ROUNDING)) & (np.asarray(values) <= high * (1 + ROUNDING))
        return inside


@dataclass(frozen=True)
class Evidence:
    """Runs and, if any, the law."""

    table: RunTable
    laws: Laws | None
    records: tuple[RunRecord, ...] = ()
    """The runs as tracking has them, with the trials and averages that the table leaves out."""

    @cached_property
    def branches(self) -> pd.DataFrame:
        """`cooldown.branch_frame` of the records."""
        from qatlaw.cooldown import branch_frame

        return branch_frame(self.records)

    @cached_property
    def scheme(self) -> str | None:
        """The scheme of the U-curves: the law's, else the two-phase scheme with more runs; None without any."""
        return self.laws.scheme if self.laws else next(iter(self.table.mixed_schemes), None)

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """The measured U-curves of `scheme` with three fractions or more."""
        from qatlaw.curves import measured_curves

        return tuple(measured_curves(self.table.of_scheme(self.scheme))) if self.scheme else ()

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The table with D (all tokens), f (the QAT fraction) and gap: the loss above the mean of the full-precision
        runs of the same size and tokens, NaN without any."""
        frame = self.table.frame.assign(D=self.table.tokens_total, f=lambda own: own["tokens_qat"] / own["D"])
        full = frame[frame["scheme"] == "fp"].groupby(["n_params", "D"])["loss"].mean().rename("full")
        return frame.join(full, on=["n_params", "D"]).assign(gap=lambda own: own["loss"] - own["full"])

    def cell(self, scheme: str, N: float, D: float, B: float) -> pd.DataFrame:
        """The rows of `frame` of one cell, over its seeds and fractions."""
        frame = self.frame
        return frame[(frame["scheme"] == scheme) & (frame["n_params"] == N) & (frame["D"] == D) & (frame["bits"] == B)]

    @cached_property
    def fusion_pairs(self) -> pd.DataFrame:
        """Columns sequential and fused: the mean losses of runs with the same size, width and tokens of both phases."""
        cell = ["n_params", "bits", "tokens_fp", "tokens_qat"]
        means = self.rows(*MIXED_SCHEMES).frame.groupby([*cell, "scheme"])["loss"].mean().unstack("scheme")
        return means.reindex(columns=list(MIXED_SCHEMES)).dropna().reset_index()

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """Bit widths of its runs, including post-training quantization."""
        return tuple(sorted(set(self.rows("sequential", "fused", "scratch", "ptq").column("bits").tolist())))

    @cached_property
    def law_by_width(self) -> dict[float, Law]:
        laws = self.laws.by_width if self.laws else {}
        return {bits: law for bits in self.widths if (law := laws.get(None) or laws.get(bits))}

    def rows(self, *schemes: str) -> RunTable:
        return self.table.where(self.table.frame["scheme"].isin(schemes).to_numpy())

    @cached_property
    def about_law(self) -> str:
        """For captions; empty without a law."""
        if self.laws is None:
            return ""
        made_up = " Its coefficients are made up for demonstration: no run was measured for them."
        return f"The law is {self.laws.source}.{made_up if self.laws.demonstration else ''}"


QAT, COOLDOWNS = "arXiv 2509.22935", "arXiv 2508.01483"


@dataclass(frozen=True)
class Drawn:
    """A figure of the report, or why it is missing."""

    caption: str = ""
    """Says what is measured and what is predicted by a law, with units and ranges."""
    figure: Figure | None = None
    table: pd.DataFrame | None = None
    """Its numbers, for a file beside it."""
    lacking: str = ""
    """What it would need, where `figure` is None."""
    warnings: tuple[str, ...] = ()
    name: str = ""
    """Stem of its files."""
    title: str = ""
    paper: str = ""


def closed_form_warnings(table: RunTable) -> tuple[str, ...]:
    """How many quantized runs lie where the closed form was not measured."""
    S = table.tokens_per_byte
    low, high = MEASURED_S
    outside = int(np.count_nonzero((low > S) | (high < S)))
    if not outside:
        return ()
    return (
        f"{outside} of {len(S)} runs lie outside S = {low:g} to {high:g} tokens per parameter byte (these runs: "
        f"{np.min(S):.3g} to {np.max(S):.3g}): the closed form is an extrapolation there.",
    )
