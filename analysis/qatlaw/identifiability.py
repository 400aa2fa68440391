"""Parameters of a law that a table of runs does not determine.

The Jacobian of the residuals at the optimum shows how the losses respond to each parameter. Its columns are scaled to
equal length, so that parameters are compared by their effect on the losses (nats) and not by their own size: a
coefficient may go to zero. Parameters whose columns nearly depend on each other trade against each other, and any one
of them alone means little (D. A. Belsley, E. Kuh, R. E. Welsch, Regression Diagnostics, 1980, chapter 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qatlaw.information import is_determined
from qatlaw.laws.base import Floats
from qatlaw.problem import Problem

OPEN = 1e-8
"""Singular values of the scaled Jacobian over the largest, below which no loss responds to the direction."""
NAMED = 1e-3
"""Component along such a direction above which a parameter is open."""
SHARED = 0.5
"""Share of a parameter's variance (squared correlation) above which another one is named as trading against it."""


@dataclass(frozen=True)
class Identifiability:
    """What the data leave open, by name and in words."""

    open: tuple[str, ...]
    """Parameters along which no loss changes, if others change with them."""
    at_bound: tuple[str, ...]
    """Parameters that ended on a bound: the data would have them beyond it, or do not need their term."""
    vanished: dict[str, tuple[str, ...]]
    """Coefficients, with their exponents, whose term changes all losses together by less than the noise."""
    loose: tuple[tuple[str, ...], ...]
    """Groups of parameters that the data do not determine separately."""

    @property
    def sentences(self) -> list[str]:
        sentences = [
            f"The data do not pin down {_listed(names)}{' separately' if len(names) > 1 else ''}: they can change "
            "without changing a loss beyond the noise."
            for names in self.loose
        ]
        for name, exponents in self.vanished.items():
            rest = f" Without it {_listed(exponents)} mean nothing." if exponents else ""
            sentences.append(f"The data do not need the term of {name}, which came out as zero.{rest}")
        if bound := [name for name in self.at_bound if name not in self.vanished]:
            sentences.append(f"On the bound of what is sound: {_listed(bound)}.")
        return sentences


def identify(problem: Problem, variables: Floats, noise: float) -> Identifiability:
    """At the optimum `variables`, given the residuals' standard deviation."""
    form = problem.form
    low, high = problem.bounds
    on_bound = (variables - low < 1e-5 * (high - low)) | (high - variables < 1e-5 * (high - low))
    jacobian = problem.jacobian(variables) / max(noise, 1e-12)
    # Standard deviations of the noise by which a factor e of a coefficient, or 1 of an exponent, moves all losses.
    response = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    _, singular, directions = np.linalg.svd(jacobian / response, full_matrices=False)
    floor = OPEN * singular[0]
    covariance = (directions.T / np.maximum(singular, floor) ** 2) @ directions
    spread = np.sqrt(np.diag(covariance))
    is_open = (np.abs(directions[singular < floor]) > NAMED).any(axis=0)
    errors = np.where(is_open, np.inf, spread / response)

    gone = (response < 1) & ~is_open
    vanished = {term.coefficient: term.exponents for term in form.terms if gone[form.index[term.coefficient]]}
    without_meaning = {name for coefficient, exponents in vanished.items() for name in (coefficient, *exponents)}
    asked = [i for i, name in enumerate(form.names) if name not in without_meaning]
    undetermined = [i for i in asked if not is_determined(form.parameters[i], variables[i], errors[i])]
    loose = []
    while undetermined:
        with_first = covariance[undetermined[0]] / (spread[undetermined[0]] * spread)
        group = [i for i in asked if with_first[i] ** 2 >= SHARED]
        loose.append(tuple(form.names[i] for i in group))
        undetermined = [i for i in undetermined if i not in group]
    return Identifiability(
        open=tuple(form.names[i] for i in np.flatnonzero(is_open)),
        at_bound=tuple(form.names[i] for i in np.flatnonzero(on_bound)),
        vanished=vanished,
        loose=tuple(loose),
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
