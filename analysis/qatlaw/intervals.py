"""Intervals of what follows from resampled laws. NumPy alone: a planner reads them from a fit.json in no time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.fraction import ROUNDING
from qatlaw.laws.base import LawForm
from qatlaw.laws.points import Floats


@dataclass(frozen=True)
class Bootstrap:
    """Laws fitted to resampled runs, and percentile intervals of what follows from them."""

    form: LawForm
    thetas: Floats
    """[resamples, parameters]"""
    level: float = 0.95
    """Share of the resamples inside an interval."""
    unknown: tuple[str, ...] = ()
    """Parameters that have no interval: the runs leave them open, or their trunks are too few."""
    loss_sizes: tuple[float, ...] | None = None
    """Sizes N at which losses have an interval; None: any."""

    @cached_property
    def coefficients(self) -> dict[str, tuple[float, float]]:
        """By name its interval, of those that have one."""
        low, high = self._interval(self.thetas)
        known = [i for i, name in enumerate(self.form.names) if name not in self.unknown]
        return {self.form.names[i]: (float(low[i]), float(high[i])) for i in known}

    def fraction(self, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> tuple[Floats, Floats]:
        """Interval of the optimal fraction."""
        return self._interval(np.stack([self.form.optimal_fraction(theta, N, D_total, B) for theta in self.thetas]))

    def loss(self, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> tuple[Floats, Floats]:
        """Interval of the law's loss in nats: of the law, without the noise that a single run adds.

        NaN at sizes where none can be given.
        """
        low, high = self._interval(np.stack([self.form.loss(theta, N, D_fp, D_qat, B) for theta in self.thetas]))
        if self.loss_sizes is None:
            return low, high
        sizes = np.array(self.loss_sizes)
        known = (np.abs(np.asarray(N, np.float64)[..., None] / sizes - 1) <= ROUNDING).any(axis=-1)
        return np.where(known, low, np.nan), np.where(known, high, np.nan)

    def _interval(self, values: Floats) -> tuple[Floats, Floats]:
        outside = (1 - self.level) / 2
        low, high = np.quantile(values, [outside, 1 - outside], axis=0)
        return low, high
