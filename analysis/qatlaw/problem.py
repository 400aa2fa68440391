"""The least-squares problem behind a fit: its variables, residuals, Jacobian and cold starts.

Three choices make it easy, all of them measured (analysis/benchmarks/fit_recovery.md):

- **Centred variables.** A coefficient alone means nothing: beta is the data term at one token, and moves by orders of
  magnitude with gamma. Fitted in its place is the logarithm of the term at the centre of the data, in nats. The
  exponents then turn the term about that centre.
- **Starts by linear least squares.** Given the exponents, the coefficients are linear: non-negative least squares gives
  the best ones. So every term of a cold start has the right size from the first step.
- **Residuals of log loss.** Noise of 0.2 % is 0.002 at any loss. A pseudo-Huber loss squares residuals up to `delta`
  and is linear beyond.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qatlaw.laws.base import Floats, LawForm, Points

SMALLEST = 1e-8
"""Least contribution of a term, in nats at the centre of the data: below, the term is as good as absent."""
FIRST_SIZE = 1e-2
"""Start, in nats, of a term that linear least squares sets to zero: an absent term has no gradient to return by."""


@dataclass(frozen=True)
class Problem:
    """Runs, and the form to fit to them. Variables: [parameters], see the module's first lines."""

    form: LawForm
    points: Points
    loss: Floats
    """[runs], nats."""
    trunks: NDArray[np.int64]
    """[runs]: equal for runs that share a trunk."""
    trunk_noise: float = 0.0
    """Standard deviation of the noise that a trunk's runs share, over that of each run's own."""

    @cached_property
    def centres(self) -> Mapping[str, Points]:
        """By coefficient: the mean of the log features over the runs that its term describes, as one quantized run."""
        centres = {}
        for term in self.form.terms:
            used = self.points.quantized if term.quantized_only else np.ones(self.points.shape, dtype=bool)
            centres[term.coefficient] = Points(
                log={name: np.array([values[used].mean()]) for name, values in self.points.log.items()},
                quantized=np.array([True]),
                from_scratch=np.array([False]),
                bits=np.array([self.points.bits[used].mean()]),
            )
        return centres

    @cached_property
    def bounds(self) -> tuple[Floats, Floats]:
        largest = np.log(4 * self.loss.max())
        low = [np.log(SMALLEST) if p.log else p.low for p in self.form.parameters]
        high = [largest if p.log else p.high for p in self.form.parameters]
        return np.array(low), np.array(high)

    def theta(self, variables: Floats) -> Floats:
        """The form's parameters in their natural units."""
        theta = np.array(variables, dtype=np.float64)
        theta[self._factors] = np.exp(variables[self._factors] - self._centre_shapes(variables))
        return theta

    def sound_theta(self, variables: Floats) -> Floats:
        """`theta` inside the form's bounds, which rounding can leave."""
        parameters = self.form.parameters
        return np.clip(self.theta(variables), [p.low for p in parameters], [p.high for p in parameters])

    def variables(self, theta: Floats) -> Floats:
        """The inverse of `theta`."""
        variables = np.array(theta, dtype=np.float64)
        variables[self._factors] = np.log(theta[self._factors]) + self._centre_shapes(theta)
        return variables

    def errors(self, variables: Floats) -> Floats:
        """log(predicted / measured loss), [runs]: what is reported."""
        return np.log(self.form.loss_at(self.theta(variables), self.points) / self.loss)

    def residuals(self, variables: Floats) -> Floats:
        """The errors with the trunks' shared noise weighed down, [runs]: what is fitted."""
        return self.whitened(self.errors(variables))

    def jacobian(self, variables: Floats) -> Floats:
        """d residuals / d variables, [runs, parameters]."""
        theta = self.theta(variables)
        values = self.form.values(theta)
        loss, gradient = self.form.loss_and_gradient_at(theta, self.points)
        by_variable = gradient / loss[:, None]
        for term in self.form.terms:
            i = self.form.index[term.coefficient]
            by_variable[:, i] *= theta[i]
            # An exponent turns its term about the centre: the coefficient changes so that the centre stays.
            for name, slope in term.slopes(values, self.centres[term.coefficient]).items():
                by_variable[:, self.form.index[name]] -= by_variable[:, i] * slope[0]
        return self.whitened(by_variable)

    def start(self, rng: np.random.Generator) -> Floats:
        """A cold start: exponents drawn (log-uniform over their start ranges), coefficients by linear least squares."""
        from scipy.optimize import nnls

        variables = np.zeros(len(self.form.parameters))
        for i, parameter in enumerate(self.form.parameters):
            if not parameter.log:
                variables[i] = np.exp(rng.uniform(*np.log(parameter.start)))
        values = self.form.values(variables)
        shapes = np.stack([self.form.shape_of(term, values, self.points) for term in self.form.terms], axis=1)
        # Relative to the measured loss, as the residuals are.
        relative = shapes / np.exp(self._centre_shapes(variables)) / self.loss[:, None]
        sizes, _ = nnls(relative, np.ones_like(self.loss))
        variables[self._factors] = np.log(np.maximum(sizes, FIRST_SIZE))
        return np.clip(variables, *self.bounds)

    def solve(self, start: Floats, delta: float, tolerance: float = 1e-10) -> Any:
        """SciPy's result of one descent: trust region with bounds, analytic Jacobian, pseudo-Huber at `delta`."""
        from scipy.optimize import least_squares

        low, high = self.bounds
        inside = np.clip(start, low + 1e-9 * (high - low), high - 1e-9 * (high - low))
        return least_squares(
            self.residuals, inside, self.jacobian, bounds=(low, high), loss="soft_l1", f_scale=delta, x_scale="jac",
            max_nfev=300, ftol=tolerance, xtol=tolerance, gtol=tolerance,
        )  # fmt: skip

    def whitened(self, values: Floats) -> Floats:
        """Values with the trunks' shared noise weighed down: [runs] or [runs, columns].

        Runs that share noise of variance c^2 beside their own of variance 1 have the covariance 1 + c^2 J over a trunk
        of n runs. Its inverse root takes the part 1 - 1/sqrt(1 + n c^2) of the trunk's mean out of each residual.
        """
        if self.trunk_noise == 0:
            return values
        _, trunk, count = np.unique(self.trunks, return_inverse=True, return_counts=True)
        taken = (1 - 1 / np.sqrt(1 + count * self.trunk_noise**2)) / count
        columns = values.reshape(len(values), -1)
        sums = np.stack([np.bincount(trunk, column) for column in columns.T], axis=1)
        return (columns - (sums * taken[:, None])[trunk]).reshape(values.shape)

    @cached_property
    def _factors(self) -> list[int]:
        """[terms]: the places of their coefficients."""
        return [self.form.index[term.coefficient] for term in self.form.terms]

    def _centre_shapes(self, parameters: Floats) -> Floats:
        """[terms]: `Term.log_shape` at the centre of the data; of `parameters` the exponents count."""
        values = self.form.values(parameters)
        shapes = [term.log_shape(values, self.centres[term.coefficient]) for term in self.form.terms]
        return np.concatenate(shapes)
