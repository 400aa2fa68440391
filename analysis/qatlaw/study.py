"""A study: the cheapest tree of runs that covers a grid. `qatlaw.information`: what its runs would tell about a law.

A run prescribes settings for each of its steps. Two runs of the same model, data and seed are one and the
same training up to the first step whose settings differ; what they share has to be trained once. The runs of a study
so make a prefix tree over steps, and its edges are the least that must be trained: each is needed by some run, and no
two edges are equal. Whoever reaches a fork first trains up to it and keeps a checkpoint; the others branch there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property


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
