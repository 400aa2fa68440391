"""What a table of runs does not pin down about a law.

The Jacobian of the residuals at the optimum tells how the losses answer to the parameters. A direction in parameter
space along which they hardly answer (a small singular value) is one the data leave open: coefficients may trade against
each other there, and any one of them alone means little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qatlaw.laws.points import Floats

if TYPE_CHECKING:
    from qatlaw.problem import Problem

UNIT_LOG_SIZE = 1.0
"""One unit of a coefficient is a factor e; one of an exponent is half the range that its cold starts are drawn from,
which spans plausible laws. A direction unknown by as much is one the data say nothing about."""
LOOSE = 0.5
"""Units of standard deviation from which on a direction counts as not pinned down."""
NOTICED = 0.3
"""Share of a direction's largest component from which on a parameter is named as part of it."""


@dataclass(frozen=True)
class Direction:
    """A combination of parameters, and how well it is known."""

    deviation: float
    """Standard deviation along it, in the units above."""
    parts: dict[str, float]
    """By parameter its component, the named ones only; the sign tells what moves with and what against what."""

    @property
    def sentence(self) -> str:
        rising = [name for name, part in self.parts.items() if part > 0]
        falling = [name for name, part in self.parts.items() if part < 0]
        if len(self.parts) == 1:
            return f"The data do not pin down {rising[0]}."
        if not falling:
            return (
                f"The data do not pin down {_listed(rising)}: raising them together changes no loss beyond the noise."
            )
        return (
            f"The data do not pin down {_listed([*rising, *falling])} separately: raising {_listed(rising)} "
            f"while lowering {_listed(falling)} changes no loss beyond the noise."
        )


@dataclass(frozen=True)
class Identifiability:
    """Singular values largest first, standard errors by parameter, and the open directions in words."""

    singular_values: tuple[float, ...]
    """Of the Jacobian in units of noise: residual standard deviations per unit of a direction."""
    condition: float
    standard_errors: dict[str, float]
    """Coefficients: relative, at the data's centre; exponents: absolute. Linearised: the bootstrap's are better."""
    at_bound: tuple[str, ...]
    """Parameters that ended on a bound: the data would have them beyond it, or do not need their term."""
    loose: tuple[Direction, ...]

    @property
    def sentences(self) -> list[str]:
        told = [direction.sentence for direction in self.loose]
        if self.at_bound:
            told.append(f"On the bound of what is sound: {_listed(list(self.at_bound))}.")
        return told


def identify(problem: Problem, variables: Floats, noise: float) -> Identifiability:
    """At the optimum `variables`, given the residuals' standard deviation.

    A parameter on its bound does not move, and is left out of the directions.
    """
    parameters = problem.form.parameters
    low, high = problem.bounds
    on_bound = (variables - low < 1e-5 * (high - low)) | (high - variables < 1e-5 * (high - low))
    units = np.array([UNIT_LOG_SIZE if p.log else (p.start[1] - p.start[0]) / 2 for p in parameters])
    free = np.flatnonzero(~on_bound)
    scaled = problem.jacobian(variables) * np.sqrt(problem.weights)[:, None] * units / max(noise, 1e-12)
    _, singular, directions = np.linalg.svd(scaled[:, free], full_matrices=False)
    deviations = 1 / np.maximum(singular, 1e-300)
    errors = np.sqrt(((directions * deviations[:, None]) ** 2).sum(axis=0))
    loose = []
    for deviation, direction in zip(deviations[::-1], directions[::-1], strict=True):
        if deviation < LOOSE:
            break
        direction = direction * np.sign(direction[np.argmax(np.abs(direction))])
        named = np.flatnonzero(np.abs(direction) >= NOTICED * np.abs(direction).max())
        loose.append(Direction(float(deviation), {parameters[free[i]].name: float(direction[i]) for i in named}))
    return Identifiability(
        singular_values=tuple(singular.tolist()),
        condition=float(singular[0] / max(singular[-1], 1e-300)),
        standard_errors={parameters[i].name: float(error * units[i]) for i, error in zip(free, errors, strict=True)},
        at_bound=tuple(parameters[i].name for i in np.flatnonzero(on_bound)),
        loose=tuple(loose),
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
