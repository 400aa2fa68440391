"""The cheapest tree of runs that covers a study, and the order in which several workers train it.

A run prescribes settings for each of its steps. Two runs of the same model, data and seed are the same training up to
the first step whose settings differ. The shared steps are trained once. So the runs of a study form a prefix tree over
steps, and its edges are the least that must be trained: some run needs each edge, and no two are equal. The run that
reaches a fork first trains up to it and keeps a checkpoint, from which the others branch.

A free worker takes, of the runs that can start, the one with the longest path below it (R. L. Graham, Bounds on
multiprocessing timing anomalies, SIAM Journal on Applied Mathematics 17, 1969, calls this list scheduling).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
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
    """The settings of each step of one run."""

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

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Job:
    """One run of the tree, and where it begins."""

    route: Route
    parent: str | None
    """The run whose checkpoint it branches from; None: it begins at step 0."""
    start: int
    """Optimizer steps of the parent at the branch."""

    @property
    def new_tokens(self) -> int:
        return self.route.tokens - self.start * self.route.tokens_per_step

    @property
    def flops(self) -> float:
        return self.new_tokens * self.route.flops_per_token

    def flops_until(self, step: int) -> float:
        """FLOPs from the job's start to `step` of its run."""
        return (step - self.start) * self.route.tokens_per_step * self.route.flops_per_token


@dataclass(frozen=True)
class Offer:
    """The checkpoints of a run that is trained already, or being trained: the only steps at which others may branch."""

    route: Route
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Runs in an order of training: each after the one it branches from."""

    jobs: tuple[Job, ...]

    @property
    def tokens(self) -> int:
        return sum(job.new_tokens for job in self.jobs)

    @property
    def flops(self) -> float:
        return sum(job.flops for job in self.jobs)

    @property
    def tokens_alone(self) -> int:
        return sum(job.route.tokens for job in self.jobs)

    @property
    def flops_alone(self) -> float:
        return sum(job.route.tokens * job.route.flops_per_token for job in self.jobs)

    @cached_property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """By run the checkpoints to keep: the steps before its end at which others branch from it."""
        steps: dict[str, set[int]] = {job.route.name: set() for job in self.jobs}
        ends = {job.route.name: job.route.steps for job in self.jobs}
        for job in self.jobs:
            if job.parent in ends and job.start < ends[job.parent]:
                steps[job.parent].add(job.start)
        return {name: tuple(sorted(found)) for name, found in steps.items()}


def shared_steps(first: Route, second: Route) -> int:
    """Number of steps that two runs have in common, from the first step on."""
    if first.root != second.root:
        return 0
    a, b = first.pieces, second.pieces
    i = j = done = 0
    while i < len(a) and j < len(b) and a[i].rule == b[j].rule:
        done = min(a[i].end, b[j].end)
        i, j = i + (a[i].end == done), j + (b[j].end == done)
    return done


def trained_by(begins: Mapping[str, tuple[str | None, int]], name: str, step: int) -> str:
    """The run that trains `step` of the run `name`: itself, or the one that it branches from, and so on.

    begins: by run its parent and the step at which it branches.
    """
    parent, start = begins[name]
    while step <= start and parent is not None:
        name, (parent, start) = parent, begins[parent]
    return name


def cheapest_tree(routes: Sequence[Route], offers: Sequence[Offer] = ()) -> Tree:
    """Every run once, each branching off the run that has most of it already.

    Shorter runs come first: a run that another one passes through must exist before that one starts.
    offers: left by an earlier part of the study; they are not trained again and not in the tree.
    """
    names = [route.name for route in routes]
    assert len(set(names)) == len(names), "names are unique"
    jobs: list[Job] = []
    placed: dict[Hashable, list[Job]] = {}
    for route in sorted(routes, key=lambda route: (route.tokens, names.index(route.name))):
        before = placed.setdefault(route.root, [])
        found: list[tuple[Route, int]] = []
        for offer in offers:
            shared = shared_steps(offer.route, route)
            found.append((offer.route, max((step for step in offer.steps if step <= shared), default=0)))
        # `max` takes the first of equally good parents, which trains the fork itself. A parent that branches from an
        # offer may begin later than it shares.
        for old in before:
            shared = shared_steps(old.route, route)
            if shared > old.start:
                found.append((old.route, shared))
        best, start = max(found, key=lambda pair: pair[1], default=(None, 0))
        jobs.append(Job(route, best.name if best is not None and start else None, start))
        before.append(jobs[-1])
    return Tree(tuple(jobs))


# --- the order of training ---


def longest_paths(jobs: Iterable[Job]) -> dict[str, float]:
    """By name, FLOPs from the start of each job to the end of the longest chain of runs below it.

    `jobs`: each after the one it branches from. The chain leaves a job where its child branches, not at its end.
    """
    longest: dict[str, float] = {}
    below: dict[str, list[Job]] = {}
    for job in reversed(list(jobs)):
        children = below.get(job.route.name, [])
        chains = (job.flops_until(child.start) + longest[child.route.name] for child in children)
        longest[job.route.name] = max(job.flops, max(chains, default=0.0))
        if job.parent is not None:
            below.setdefault(job.parent, []).append(job)
    return longest


def next_job(ready: Iterable[str], longest: Mapping[str, float]) -> str | None:
    """The job with the longest path below it, of those that can start; the first of equals. None if none can."""
    return max(ready, key=lambda name: longest[name], default=None)


@dataclass(frozen=True)
class Slot:
    """When a job is trained, in FLOPs of one worker since the study's beginning."""

    job: Job
    begin: float
    end: float

    def reaches(self, step: int) -> float:
        """When a checkpoint at `step` exists."""
        return self.begin + self.job.flops_until(step)


def simulate(jobs: Sequence[Job], workers: int) -> list[Slot]:
    """The order in which `workers` equally fast workers train the jobs, each taking `next_job` when it is free.

    A job whose parent is not among `jobs` can start at once.
    """
    longest = longest_paths(jobs)
    order = {job.route.name: i for i, job in enumerate(jobs)}
    children: dict[str | None, list[Job]] = {}
    for job in jobs:
        children.setdefault(job.parent if job.parent in order else None, []).append(job)
    ready = {job.route.name: job for job in children.get(None, [])}
    coming: list[tuple[float, int]] = []  # (time, place in `jobs`) at which a job's parent checkpoint will exist
    free = [0.0] * workers
    slots: list[Slot] = []
    while ready or coming:
        now = heapq.heappop(free)
        while coming and coming[0][0] <= now:
            job = jobs[heapq.heappop(coming)[1]]
            ready[job.route.name] = job
        if not ready:
            heapq.heappush(free, coming[0][0])
            continue
        name = next_job(sorted(ready, key=order.__getitem__), longest)
        assert name is not None
        job = ready.pop(name)
        slot = Slot(job, now, now + job.flops)
        slots.append(slot)
        heapq.heappush(free, slot.end)
        for child in children.get(name, []):
            heapq.heappush(coming, (slot.reaches(child.start), order[child.route.name]))
    return slots
