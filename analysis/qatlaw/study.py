"""A study: the cheapest tree of runs that covers a grid, and what its runs would tell about a law.

**The tree.** A run prescribes settings for each of its steps. Two runs of the same model, data and seed are one and the
same training up to the first step whose settings differ; what they share has to be trained once. The runs of a study
so make a prefix tree over steps, and its edges are the least that must be trained: each is needed by some run, and no
two edges are equal. Whoever reaches a fork first trains up to it and keeps a checkpoint; the others branch there.

**The information.** Local design theory (H. Chernoff, Locally optimal designs for estimating parameters, Annals of
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
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

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
class Piece:
    """The steps [start, end) under one rule. Equal rules prescribe equal settings at equal steps."""

    rule: Hashable
    start: int
    end: int


@dataclass(frozen=True)
class Route:
    """One run as the tree sees it: what each of its steps is trained with."""

    name: str
    root: Hashable
    """What must be equal before anything can be shared: model, batch, data, seed."""
    pieces: tuple[Piece, ...]
    """Without gaps, from step 0 on."""
    tokens_per_step: int
    flops_per_token: float

    @property
    def steps(self) -> int:
        return self.pieces[-1].end


@dataclass(frozen=True)
class Job:
    """One run of the tree, and where it begins."""

    route: Route
    parent: str | None
    """The run whose checkpoint it branches from; None: it begins at step 0."""
    start: int
    """Optimizer steps that the parent has done at the branch."""

    @property
    def new_tokens(self) -> int:
        return (self.route.steps - self.start) * self.route.tokens_per_step


@dataclass(frozen=True)
class Tree:
    """Runs in an order in which they can be trained: each after the one it branches from."""

    jobs: tuple[Job, ...]

    @property
    def tokens(self) -> int:
        """Trained in all."""
        return sum(job.new_tokens for job in self.jobs)

    @property
    def flops(self) -> float:
        return sum(job.new_tokens * job.route.flops_per_token for job in self.jobs)

    @property
    def tokens_alone(self) -> int:
        """If each run were trained from its first step."""
        return sum(job.route.steps * job.route.tokens_per_step for job in self.jobs)

    @property
    def flops_alone(self) -> float:
        return sum(job.route.steps * job.route.tokens_per_step * job.route.flops_per_token for job in self.jobs)

    @cached_property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """By run the steps at which others branch from it, before its end: checkpoints to keep."""
        steps: dict[str, set[int]] = {job.route.name: set() for job in self.jobs}
        ends = {job.route.name: job.route.steps for job in self.jobs}
        for job in self.jobs:
            if job.parent is not None and job.start < ends[job.parent]:
                steps[job.parent].add(job.start)
        return {name: tuple(sorted(found)) for name, found in steps.items()}


def shared_steps(first: Route, second: Route) -> int:
    """How many steps two runs have in common, from the first step on."""
    if first.root != second.root:
        return 0
    done = 0
    a, b = iter(first.pieces), iter(second.pieces)
    one, other = next(a), next(b)
    while one.rule == other.rule:
        done = min(one.end, other.end)
        following = _after(one, a, done), _after(other, b, done)
        if following[0] is None or following[1] is None:
            return done
        one, other = following[0], following[1]
    return done


def _after(piece: Piece, rest: Iterator[Piece], step: int) -> Piece | None:
    """The piece that holds `step`, None at the run's end."""
    return piece if step < piece.end else next(rest, None)


def cheapest_tree(routes: Sequence[Route]) -> Tree:
    """Every run once, each branching off the run that has most of it already.

    Shorter runs first, so that a run which another one passes through on its way exists before that one starts.
    """
    names = [route.name for route in routes]
    assert len(set(names)) == len(names), "runs have names of their own"
    jobs: list[Job] = []
    placed: dict[Hashable, list[Route]] = {}
    for route in sorted(routes, key=lambda route: (route.steps * route.tokens_per_step, names.index(route.name))):
        before = placed.setdefault(route.root, [])
        # Of equally good parents the first one has trained the fork itself: an earlier one would share as much.
        best, start = max(
            ((old, shared_steps(old, route)) for old in before), key=lambda pair: pair[1], default=(None, 0)
        )
        jobs.append(Job(route, best.name if best is not None and start else None, start))
        before.append(route)
    return Tree(tuple(jobs))


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
