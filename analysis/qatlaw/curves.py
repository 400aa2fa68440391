"""U-curves: measured loss over the QAT fraction at one size, token count and bit width, and where its minimum lies.

The minimum is read off each curve alone, without a law. It is the lowest point, between the outermost fractions, of

    loss = a - b ln f - c ln(1-f) + d f^(-1/2)

The logarithms are the limit of every sum of powers of f and 1-f for small exponents. The fourth term is for short
phases, whose loss rises faster. On this project's ladder the first three terms alone missed by up to .06 nats,
systematically, and put minima where no run was lowest; all four are within the noise of a run. Curves of three
fractions have three terms. On noise-free curves of the synthetic law the reading is off by 0.01; noise of 0.05 % moves
the minimum of six runs by 0.06.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.fraction import tokens_per_parameter_byte
from qatlaw.laws.base import Floats
from qatlaw.table import MIXED_SCHEMES, RunTable

FEWEST = 3
"""Fractions of a curve."""
TERMS = 4
READING = 0.009
"""Mean error of this reading on noise-free curves of the synthetic law; part of every error bar."""
POINTS = 1001
"""Fractions between which the lowest is chosen."""
DRAWS = 400
"""Draws of the noise for the error bar of a minimum."""
ONE_SIGMA = (0.1587, 0.8413)


@dataclass(frozen=True)
class Curve:
    """One U-curve and its measured minimum."""

    N: float
    D_total: float
    B: float
    scheme: str
    fractions: Floats
    """Rising; runs of two phases only. QAT from scratch and PTQ are the curve's two ends, not on it."""
    losses: Floats
    optimum: float
    """Measured fraction of lowest loss; the outermost fraction where the curve has no minimum inside."""
    low: float
    high: float
    """One standard error about `optimum`, noise and reading together; NaN where the noise is unknown."""
    inside: bool
    """Whether the minimum lies between the outermost fractions."""

    def loss_at(self, f: ArrayLike) -> Floats:
        """The loss that the reading of the curve gives at these fractions."""
        return _terms(np.asarray(f, np.float64), len(self.fractions)) @ (_inverse(self.fractions) @ self.losses)

    @property
    def S(self) -> float:  # noqa: N802 - the symbol
        """Tokens per parameter byte."""
        return float(tokens_per_parameter_byte(self.N, self.D_total, self.B))

    @property
    def error(self) -> float:
        return (self.high - self.low) / 2

    @property
    def optimum_text(self) -> str:
        """`0.48 ± 0.02`; `≤ 0.05` or `≥ 0.95` where the minimum lies outside."""
        if self.inside:
            return f"{self.optimum:.2f}" + (f" ± {self.error:.2f}" if np.isfinite(self.error) else "")
        return f"{'≤' if self.optimum == self.fractions[0] else '≥'} {self.optimum:.2f}"


@dataclass(frozen=True)
class FractionErrors:
    """Optimal fractions of a law against measured ones."""

    curves: int
    left_out: int
    """Curves without a minimum inside."""
    mae: float
    bias: float
    """Mean of law minus measurement."""
    measurement_error: float
    """Mean error bar of the measured optima. A perfect law has an MAE of 0.8 of it."""
    within: float
    """Share of the curves whose error bar holds the law's fraction; 0.68 for a perfect law."""


def measured_curves(table: RunTable, *, noise: float | None = None) -> list[Curve]:
    """The U-curves with three fractions or more.

    noise: standard deviation of a run's log loss within a curve. None: the scatter about the curves' own readings,
        pooled over all of them; unknown (NaN error bars) where no curve has five runs.
    """
    frame = table.frame[table.frame["scheme"].isin(MIXED_SCHEMES)]
    frame = frame.assign(tokens_total=frame["tokens_fp"] + frame["tokens_qat"])
    groups = []
    for key, rows in frame.groupby(["n_params", "tokens_total", "bits", "scheme"]):
        f = (rows["tokens_qat"] / rows["tokens_total"]).to_numpy(np.float64)
        if len(set(f.tolist())) >= FEWEST:
            order = np.argsort(f)
            groups.append((key, f[order], rows["loss"].to_numpy(np.float64)[order]))
    if noise is None:
        squares, freedom = 0.0, 0
        for _, f, loss in groups:
            rest = loss - _terms(f, len(f)) @ (_inverse(f) @ loss)
            squares += float(np.sum((rest / loss) ** 2))
            freedom += max(len(f) - TERMS, 0)
        noise = float(np.sqrt(squares / freedom)) if freedom else float("nan")
    rng = np.random.default_rng(0)
    return [_curve(key, f, loss, noise, rng) for key, f, loss in groups]


OptimalFraction = Callable[[float, float, float], Any]
"""The optimal QAT fraction of (N, D, B), as `Law.optimal_fraction` gives it."""


def fraction_errors(optimum: OptimalFraction, curves: Sequence[Curve]) -> dict[str, FractionErrors]:
    """By bit width ("4"), and "all"; widths without a usable curve are missing."""
    widths = sorted({curve.B for curve in curves})
    errors = {}
    for name, wanted in (("all", widths), *((f"{bits:g}", [bits]) for bits in widths)):
        used = [curve for curve in curves if curve.inside and curve.B in wanted]
        if not used:
            continue
        law = np.array([float(optimum(curve.N, curve.D_total, curve.B)) for curve in used])
        gaps = law - [curve.optimum for curve in used]
        bars = np.array([curve.error for curve in used])
        held = [curve.low <= f <= curve.high for curve, f in zip(used, law, strict=True)]
        errors[name] = FractionErrors(
            curves=len(used),
            left_out=sum(curve.B in wanted and not curve.inside for curve in curves),
            mae=float(np.mean(np.abs(gaps))),
            bias=float(np.mean(gaps)),
            measurement_error=float(np.mean(bars)),
            within=float(np.mean(held)) if np.isfinite(bars).all() else float("nan"),
        )
    return errors


def _terms(f: Floats, runs: int) -> Floats:
    """[..., terms] of a curve of so many runs at f."""
    terms = [np.ones_like(f), -np.log(f), -np.log1p(-f), f**-0.5]
    return np.stack(terms[: min(runs, TERMS)], axis=-1)


def _inverse(f: Floats) -> Floats:
    """Takes the losses at f to the coefficients of the terms."""
    return np.asarray(np.linalg.pinv(_terms(f, len(f))), np.float64)


def _curve(
    key: tuple[float, float, float, str], f: Floats, loss: Floats, noise: float, rng: np.random.Generator
) -> Curve:
    first, *_, last = np.log(f / (1 - f))
    grid = 1 / (1 + np.exp(-np.linspace(first, last, POINTS)))
    grid[[0, -1]] = f[[0, -1]]
    reading = _terms(grid, len(f)) @ _inverse(f)
    lowest = int((reading @ loss).argmin())
    optimum = float(grid[lowest])
    low = high = float("nan")
    if np.isfinite(noise):
        drawn = loss[:, None] * (1 + noise * rng.standard_normal((len(f), DRAWS)))
        ends = np.quantile(grid[(reading @ drawn).argmin(axis=0)], ONE_SIGMA)
        down, up = np.hypot(np.maximum([1, -1] * (optimum - ends), 0), READING)
        low, high = max(float(optimum - down), 0.0), min(float(optimum + up), 1.0)
    N, D_total, B, scheme = key
    return Curve(N, D_total, B, scheme, f, loss, optimum, low, high, inside=0 < lowest < POINTS - 1)
