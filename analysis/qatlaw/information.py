"""How much runs say about a law: Fisher information and the standard errors it allows.

A fit evaluates it at the fitted law, a study at the law that is assumed. Local design theory (H. Chernoff, Locally
optimal designs for estimating parameters, Annals of Mathematical Statistics 24, 1953): under a law L(theta) and
independent normal noise of standard deviation s on log loss, n runs carry the Fisher information

    I = (1 / s^2) * sum over runs of  g g^T,        g = d ln L / d theta,

and no unbiased estimate has a smaller covariance than its inverse (Cramer-Rao). The optimal fraction follows by the
delta method: var f* = h^T I^-1 h with h = d f* / d theta. Branches of one trunk share some of their noise. A fit weighs
it down as far as it is known. A study does not know it: levels are less certain than this says, and differences between
branches more.

A law is fitted to the runs of one two-phase scheme and those in full precision, each point by one run (`qatlaw.runs`).
`certainties` judges a study in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qatlaw.laws.base import Floats, Law, Parameter, Points
from qatlaw.table import MIXED_SCHEMES, points_of

OPEN = 1e-9
"""Eigenvalues of the scaled information over the largest, below which a direction is not determined in float64."""
NAMED = 1e-3
"""Component along such a direction above which a parameter (or f*) is not determined either."""
STEP = 1e-5
"""Step of the central differences of f*, in relative units of a parameter."""
DETERMINED = 0.3
"""Standard error over the value up to which a parameter counts as determined; for f*, the error itself."""
SMALL_EXPONENT = 0.05
"""Exponents below count as this large: a hundredfold of the feature changes their term by a quarter at most."""
NOT_DETERMINED = "not determined"


def is_determined(parameter: Parameter, value: float, error: float) -> bool:
    """Whether a standard error leaves something of a parameter; `error` is relative for coefficients."""
    return error <= DETERMINED * (1.0 if parameter.log else max(abs(value), SMALL_EXPONENT))


def information(law: Law, points: Points, noise: float, weighed: Callable[[Floats], Floats] | None = None) -> Floats:
    """[parameters, parameters]: Fisher information of the runs' losses, see the module's first lines.

    Coefficients count by their logarithm, so that their errors are relative; exponents as they are.
    noise: standard deviation of a run's log loss. weighed: takes the noise that runs share out of columns of [runs].
    """
    loss, gradient = law.form.loss_and_gradient_at(law.theta, points)
    slopes = gradient / loss[:, None] * _units(law)
    if weighed is not None:
        slopes = weighed(slopes)
    return slopes.T @ slopes / noise**2


@dataclass(frozen=True)
class Certainty:
    """Standard errors that the runs allow at best; infinite for what they do not determine."""

    law: Law
    covariance: Floats
    """Covariance in the determined directions."""
    undetermined: Floats
    """[parameters, directions]: orthonormal in scaled units; may have no column."""
    scale: Floats
    """[parameters]: each one's scaled unit, in which it alone would be known to 1."""

    @classmethod
    def from_information(cls, law: Law, fisher: Floats) -> Certainty:
        # In such units rounding does not decide what is determined.
        scale = 1 / np.sqrt(np.maximum(np.diag(fisher), 1e-300))
        values, vectors = np.linalg.eigh(fisher * np.outer(scale, scale))
        known = values > OPEN * values[-1]
        inverse = (vectors[:, known] / values[known]) @ vectors[:, known].T
        return cls(law, inverse * np.outer(scale, scale), vectors[:, ~known], scale)

    @property
    def parameters(self) -> dict[str, float]:
        """By name the standard error: relative for coefficients, absolute for exponents."""
        names = self.law.form.names
        return {name: self._error(np.eye(len(names))[i]) for i, name in enumerate(names)}

    @property
    def determined(self) -> dict[str, float | None]:
        """`parameters`, with None for those that are not determined."""
        pairs = zip(self.law.form.parameters, self.law.theta, self.parameters.values(), strict=True)
        return {one.name: error if is_determined(one, value, error) else None for one, value, error in pairs}

    def fraction(self, N: float, D: float, B: float) -> float:
        """Standard error of the optimal fraction at one size, token count and width."""
        theta, units = np.array(self.law.theta), _units(self.law)
        slope = np.empty(len(theta))
        for i in range(len(theta)):
            step = np.zeros(len(theta))
            step[i] = STEP * units[i]
            up, down = (self.law.form.optimal_fraction(theta + sign * step, N, D, B) for sign in (1, -1))
            slope[i] = float(up - down) / (2 * STEP)
        return self._error(slope)

    def _error(self, slope: Floats) -> float:
        """Standard error of a quantity with this gradient in the parameters."""
        scaled = slope * self.scale
        norm = float(np.linalg.norm(scaled))
        if norm and self.undetermined.size and np.linalg.norm(self.undetermined.T @ scaled) > NAMED * norm:
            return float("inf")
        return math.sqrt(max(float(slope @ self.covariance @ slope), 0.0))


def certainties(
    law: Law, planned: pd.DataFrame, noise: float, known: pd.DataFrame | None = None, width: float | None = None
) -> dict[str, tuple[Certainty | None, Certainty]]:
    """By two-phase scheme of the planned runs: the certainty by the known runs (None without any), and by both.

    The key is `fp` where no run has two phases. planned, known: a row a point, with the columns of a table but the
    loss. A planned run whose point is known already adds nothing. width: for a law of one bit width.
    """

    def by(rows: pd.DataFrame, scheme: str) -> Certainty:
        own = rows[rows["scheme"].isin(["fp", scheme])]
        if width is not None:
            own = own[(own["tokens_qat"] == 0) | (own["bits"] == width)]
        own = own[law.form.describes(points_of(own))]
        return Certainty.from_information(law, information(law, points_of(own), noise))

    both = planned.assign(point=_named(planned))
    if known is not None:
        both = pd.concat([known.assign(point=_named(known)), both[~both["point"].isin(_named(known))]])
    schemes = [name for name in MIXED_SCHEMES if (planned["scheme"] == name).any()] or ["fp"]
    return {name: (None if known is None else by(known, name), by(both, name)) for name in schemes}


def _named(rows: pd.DataFrame) -> pd.Series:
    """By run, as text, what a law and a repeat know of it. A table without seeds has the default one."""
    seed = rows["seed"].astype(str) if "seed" in rows.columns else pd.Series("0", rows.index)
    bits = rows["bits"].where(rows["tokens_qat"] > 0, 0)
    numbers = (rows["n_params"], bits, rows["tokens_fp"], rows["tokens_qat"])
    texts = [column.astype(float).map("{:.9g}".format) for column in numbers]
    return texts[0].str.cat([*texts[1:], rows["scheme"].astype(str), seed], sep=" ")


def error_text(parameter: Parameter | None, error: float | None) -> str:
    """A standard error for a table: relative for coefficients, absolute for exponents and for f* (parameter None)."""
    if error is None:
        return NOT_DETERMINED
    return f"{error:.2%}" if parameter is not None and parameter.log else f"{error:.4f}"


def _units(law: Law) -> Floats:
    """d theta / d (fitted unit): a coefficient's own value, 1 for an exponent."""
    pairs = zip(law.form.parameters, law.theta, strict=True)
    return np.array([value if parameter.log else 1.0 for parameter, value in pairs])
