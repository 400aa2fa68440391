"""The noise of runs: what each has of its own, and what the runs of one trunk share.

Runs of one size and seed begin as the same training: a study trains their trunk once. Their losses err together, so n
of them are fewer than n measurements of the law's level. With r the residual of log loss, T trunks and K sizes,

    r = u(trunk) + e(run),    u ~ N(0, trunk^2),    e ~ N(0, own^2),

`own` follows from the scatter within trunks and `trunk` from that between the trunks of one size (analysis of variance;
S. R. Searle, G. Casella, C. E. McCulloch, Variance Components, 1992, chapter 3). Between sizes it cannot be separated
from the law, so one seed a size does not determine it. It has T - K degrees of freedom, usually few. `draw` gives
standard deviations as uncertain as that (generalized pivotal quantity; S. Weerahandi, JASA 88, 1993), so that
intervals widen as Student's do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from qatlaw.laws.base import Floats

OUTLYING = 4.0
"""Robust standard deviations at which residuals are cut, so that one outlier does not look like a trunk."""
CHANCE = 0.05
"""Share of tables without trunk noise that are weighed all the same, at a small cost in the level's precision."""
LEAST_FREEDOM = 2
"""With a single degree of freedom the interval of a level is 13 standard errors to each side."""


@dataclass(frozen=True)
class Noise:
    """Standard deviations of log loss."""

    own: float
    trunk: float
    """0 also where it is not known."""
    freedom: int
    """Degrees of freedom of `trunk`: trunks beyond the first of each size."""
    between: float
    """Mean square between trunks, whose expectation is own^2 + shared * trunk^2."""
    shared: float
    """Runs of a trunk, on average; 0 where no trunk has two runs and all noise is a run's own."""

    @property
    def trunk_is_known(self) -> bool:
        return self.shared == 0 or self.freedom >= LEAST_FREEDOM

    @property
    def ratio(self) -> float:
        """Noise that a trunk's runs share, over each run's own; 0 where the trunks' scatter may be chance."""
        if self.trunk == 0 or self.between * self.freedom <= self.own**2 * chdtri(self.freedom, CHANCE):
            return 0.0
        return self.trunk / self.own

    def draw(self, rng: np.random.Generator) -> float:
        """A trunk's standard deviation, as uncertain as it is; 0 where it is not known."""
        if self.shared == 0 or not self.trunk_is_known:
            return 0.0
        between = self.between * self.freedom / rng.chisquare(self.freedom)
        return float(np.sqrt(max(between - self.own**2, 0.0) / self.shared))


def estimate_noise(errors: Floats, trunks: NDArray[np.int64], sizes: Floats, parameters: int) -> Noise:
    """The noise in the residuals `errors` of a law with so many parameters. All arrays: [runs]."""
    _, first, trunk, count = np.unique(trunks, return_index=True, return_inverse=True, return_counts=True)
    _, size = np.unique(sizes[first], return_inverse=True)  # [trunks]
    bound = OUTLYING * 1.4826 * float(np.median(np.abs(errors)))
    held = np.clip(errors, -bound, bound)
    left = len(errors) / max(len(errors) - parameters, 1)
    runs = np.bincount(size, count)
    freedom = len(count) - len(runs)
    if len(count) == len(errors):
        return Noise(float(np.sqrt(left * np.mean(held**2))), 0.0, freedom, 0.0, 0.0)
    means = np.bincount(trunk, held) / count
    own = float(np.sqrt(left * np.sum((held - means[trunk]) ** 2) / (len(errors) - len(count))))
    if freedom == 0:
        return Noise(own, 0.0, 0, 0.0, float(np.mean(count)))
    level = np.bincount(size, count * means) / runs
    between = float(np.sum(count * (means - level[size]) ** 2)) / freedom
    shared = float(np.sum(runs - np.bincount(size, count.astype(np.float64) ** 2) / runs)) / freedom
    trunk_noise = np.sqrt(max(between - own**2, 0.0) / shared) if freedom >= LEAST_FREEDOM else 0.0
    return Noise(own, float(trunk_noise), freedom, between, shared)


def own_errors(errors: Floats, trunks: NDArray[np.int64], noise: Noise) -> Floats:
    """The residuals without the expected share of their trunk, given its runs (best linear prediction)."""
    _, trunk, count = np.unique(trunks, return_inverse=True, return_counts=True)
    weight = count * noise.ratio**2
    return errors - (weight / (1 + weight) * np.bincount(trunk, errors) / count)[trunk]
