"""What the runs of a study would tell about a law: Fisher information and the standard errors it allows.

Local design theory (H. Chernoff, Locally optimal designs for estimating parameters, Annals of
Mathematical Statistics 24, 1953): under a law L(theta) and independent normal noise of standard deviation s on log
loss, n runs carry the Fisher information

    I = (1 / s^2) * sum over runs of  g g^T,        g = d ln L / d theta,

and no unbiased estimate has a smaller covariance than its inverse (Cramer-Rao). The optimal fraction follows by the
delta method: var f* = h^T I^-1 h with h = d f* / d theta. Runs of other studies add their own I. It is an answer under
the law that is assumed, and for fits that use all runs alike: branches of one trunk share some of their noise, which
makes levels less certain than this says, and differences between branches more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qatlaw.laws.base import Law
from qatlaw.laws.points import Floats, Points

OPEN = 1e-9
"""Of the scaled information's eigenvalues over the largest: below, a direction is not determined in float64."""
NAMED = 1e-3
"""A parameter (or f*) that moves that much along such a direction is not determined either."""
STEP = 1e-5
"""Of the central differences of f*, in relative units of a parameter."""


@dataclass(frozen=True)
class Runs:
    """Runs as a law takes them; arrays of one length."""

    N: Floats
    D_fp: Floats
    D_qat: Floats
    B: Floats

    def __len__(self) -> int:
        return len(self.N)

    def __add__(self, other: Runs) -> Runs:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("N", "D_fp", "D_qat", "B"))
        return Runs(*(np.concatenate(pair) for pair in pairs))

    def described(self, law: Law) -> Runs:
        """Those that the law says something of."""
        keep = law.form.describes(Points.of(self.N, self.D_fp, self.D_qat, self.B))
        return Runs(self.N[keep], self.D_fp[keep], self.D_qat[keep], self.B[keep])


def information(law: Law, runs: Runs, noise: float) -> Floats:
    """[parameters, parameters]: Fisher information of the runs' losses, see the module's first lines.

    Coefficients count by their logarithm, so that an error of one is relative; exponents as they are.
    noise: standard deviation of a run's log loss.
    """
    points = Points.of(runs.N, runs.D_fp, runs.D_qat, runs.B)
    loss, gradient = law.form.loss_and_gradient_at(law.theta, points)
    slopes = gradient / loss[:, None] * _units(law)
    return slopes.T @ slopes / noise**2


@dataclass(frozen=True)
class Certainty:
    """Standard errors that the runs allow at best; infinite for what they do not determine."""

    law: Law
    covariance: Floats
    """Of the determined directions."""
    undetermined: Floats
    """[parameters, directions]: orthonormal in scaled units; may have no column."""
    scale: Floats
    """[parameters]: each one's scaled unit, in which it alone would be known to 1."""

    @classmethod
    def of(cls, law: Law, fisher: Floats) -> Certainty:
        # In such units rounding does not decide what is determined.
        scale = 1 / np.sqrt(np.maximum(np.diag(fisher), 1e-300))
        values, vectors = np.linalg.eigh(fisher * np.outer(scale, scale))
        known = values > OPEN * values[-1]
        inverse = (vectors[:, known] / values[known]) @ vectors[:, known].T
        return cls(law, inverse * np.outer(scale, scale), vectors[:, ~known], scale)

    @property
    def parameters(self) -> dict[str, float]:
        """By name: of coefficients the relative standard error, of exponents the absolute one."""
        names = self.law.form.names
        return {name: self._error(np.eye(len(names))[i]) for i, name in enumerate(names)}

    def fraction(self, N: float, D: float, B: float) -> float:
        """Standard error of the optimal fraction at one size, token count and width."""
        return self._error(_fraction_slope(self.law, N, D, B))

    def _error(self, slope: Floats) -> float:
        """Of a quantity with this gradient in the parameters."""
        scaled = slope * self.scale
        norm = float(np.linalg.norm(scaled))
        if norm and self.undetermined.size and np.linalg.norm(self.undetermined.T @ scaled) > NAMED * norm:
            return float("inf")
        return math.sqrt(max(float(slope @ self.covariance @ slope), 0.0))


def _units(law: Law) -> Floats:
    """d theta / d (fitted unit): a coefficient's own value, 1 for an exponent."""
    pairs = zip(law.form.parameters, law.theta, strict=True)
    return np.array([value if parameter.log else 1.0 for parameter, value in pairs])


def _fraction_slope(law: Law, N: float, D: float, B: float) -> Floats:
    """d f* / d theta in the units of `information`, by central differences."""
    theta, units = np.array(law.theta), _units(law)
    slope = np.empty(len(theta))
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = STEP * units[i]
        up, down = (law.form.optimal_fraction(theta + sign * step, N, D, B) for sign in (1, -1))
        slope[i] = float(up - down) / (2 * STEP)
    return slope
