"""U-curves: measured loss over the QAT fraction at one size, token count and bit width, and where its minimum lies.

The minimum is read off each curve alone, without a law, by

    loss = a - b ln f - c ln(1-f),    minimum at f = b / (b + c)

the limit of every sum of powers of f and 1-f for small exponents. It is linear in its three unknowns. On noise-free
curves of the synthetic law it lies 0.01 below the true optimum. A fourth term would mend that and raise the error under
noise by half. Noise of 0.05 % moves the minimum of six runs by 0.04.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qatlaw.fraction import tokens_per_parameter_byte
from qatlaw.laws.base import Floats
from qatlaw.table import MIXED_SCHEMES, RunTable

UNKNOWNS = 3
READING = 0.012
"""Mean error of this reading on noise-free curves of the synthetic law; part of every error bar."""
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


def measured_curves(table: RunTable, *, noise: float | None = None, seed: int = 0) -> list[Curve]:
    """The U-curves with three fractions or more.

    noise: standard deviation of a run's log loss within a curve. None: the scatter about the curves' own fits, pooled
        over all of them; unknown (NaN error bars) where every curve has three runs.
    """
    frame = table.frame[table.frame["scheme"].isin(MIXED_SCHEMES)]
    frame = frame.assign(tokens_total=frame["tokens_fp"] + frame["tokens_qat"])
    groups = []
    for key, rows in frame.groupby(["n_params", "tokens_total", "bits", "scheme"]):
        f = (rows["tokens_qat"] / rows["tokens_total"]).to_numpy(np.float64)
        if len(set(f.tolist())) >= UNKNOWNS:
            order = np.argsort(f)
            groups.append((key, f[order], rows["loss"].to_numpy(np.float64)[order]))
    if noise is None:
        squares, freedom = 0.0, 0
        for _, f, loss in groups:
            design = _design(f)
            rest = loss - design @ np.linalg.lstsq(design, loss, rcond=None)[0]
            squares += float(np.sum((rest / loss) ** 2))
            freedom += len(f) - UNKNOWNS
        noise = float(np.sqrt(squares / freedom)) if freedom else float("nan")
    rng = np.random.default_rng(seed)
    return [_curve(key, f, loss, noise, rng) for key, f, loss in groups]


OptimalFraction = Callable[[float, float, float], Any]
"""The optimal QAT fraction of (N, D, B), as `Law.optimal_fraction` gives it."""


def fraction_errors(
    optimum: OptimalFraction | Mapping[float, OptimalFraction], curves: Sequence[Curve]
) -> dict[str, FractionErrors]:
    """By bit width ("4"), and "all"; widths without a usable curve are missing.

    optimum: for all curves, or one for each bit width; curves of other widths are ignored.
    """
    widths = sorted({curve.B for curve in curves})
    by_width = optimum if isinstance(optimum, Mapping) else dict.fromkeys(widths, optimum)
    known = [curve for curve in curves if curve.B in by_width]
    found = {}
    for name, wanted in (("all", widths), *((f"{bits:g}", [bits]) for bits in widths)):
        used = [curve for curve in known if curve.inside and curve.B in wanted]
        if not used:
            continue
        law = np.array([float(by_width[curve.B](curve.N, curve.D_total, curve.B)) for curve in used])
        gaps = law - [curve.optimum for curve in used]
        bars = np.array([curve.error for curve in used])
        held = [curve.low <= f <= curve.high for curve, f in zip(used, law, strict=True)]
        found[name] = FractionErrors(
            curves=len(used),
            left_out=sum(curve.B in wanted and not curve.inside for curve in known),
            mae=float(np.mean(np.abs(gaps))),
            bias=float(np.mean(gaps)),
            measurement_error=float(np.mean(bars)),
            within=float(np.mean(held)) if np.isfinite(bars).all() else float("nan"),
        )
    return found


def _design(f: Floats) -> Floats:
    return np.stack([np.ones_like(f), -np.log(f), -np.log1p(-f)], axis=1)


def _minimum(f: Floats, b: Floats, c: Floats) -> tuple[Floats, np.ndarray]:
    """Where a - b ln f - c ln(1-f) is lowest between the outermost fractions, and whether that is inside. b, c: [n]."""
    inner = b / np.where(b + c == 0, np.nan, b + c)
    # Without a bowl the minimum is an end: the lower one of the curve's own fit.
    rise = -b * np.log(f[-1] / f[0]) - c * (np.log1p(-f[-1]) - np.log1p(-f[0]))
    at_end = np.where(rise > 0, f[0], f[-1])
    bowl = (b > 0) & (c > 0)
    return np.where(bowl, np.clip(inner, f[0], f[-1]), at_end), bowl & (inner > f[0]) & (inner < f[-1])


def _curve(
    key: tuple[float, float, float, str], f: Floats, loss: Floats, noise: float, rng: np.random.Generator
) -> Curve:
    inverse = np.linalg.pinv(_design(f))
    coefficients = inverse @ loss
    optimum, inside = _minimum(f, coefficients[1:2], coefficients[2:3])
    low = high = float("nan")
    if np.isfinite(noise):
        drawn = coefficients[:, None] + inverse @ (loss[:, None] * noise * rng.standard_normal((len(f), DRAWS)))
        ends = np.quantile(_minimum(f, drawn[1], drawn[2])[0], ONE_SIGMA)
        down, up = np.hypot(np.maximum([1, -1] * (optimum - ends), 0), READING)
        low, high = max(float(optimum[0] - down), 0.0), min(float(optimum[0] + up), 1.0)
    N, D_total, B, scheme = key
    return Curve(N, D_total, B, scheme, f, loss, float(optimum[0]), low, high, bool(inside[0]))
