"""The order in which workers train a tree: valid for any tree, and near the bound for a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlaw.study import (
    Job,
    Offer,
    Piece,
    Route,
    Slot,
    cheapest_tree,
    longest_paths,
    shared_steps,
    simulate,
    trained_by,
)
from qatscale.study.file import read_study
from qatscale.study.grid import grid
from qatscale.study.plan import CHECKPOINT_BYTES, forecast

SMALL = Path(__file__).parents[2] / "analysis" / "studies" / "small.yaml"


def route(name: str, *pieces: tuple[str, int], root: str = "model") -> Route:
    """`pieces`: (rule, end). A step costs one FLOP."""
    starts = [0, *(end for _, end in pieces)]
    found = tuple(Piece(rule, start, end) for start, (rule, end) in zip(starts, pieces, strict=False))
    return Route(name, root, found, 1, 1.0)


@st.composite
def trees(draw: st.DrawFn) -> list[Job]:
    """Any tree, not only the cheapest: parents before children, each branching inside its parent or at its end."""
    jobs: list[Job] = []
    for i in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from([None, *jobs]))
        start = 0 if parent is None else draw(st.integers(parent.start + 1, parent.route.steps))
        steps = start + draw(st.integers(1, 9))
        jobs.append(Job(route(f"r{i}", ("s", steps)), parent.route.name if parent else None, start))
    return jobs


def bound(jobs: list[Job], workers: int) -> float:
    """No schedule can end sooner: the longest chain, or all work spread evenly."""
    return max(max(longest_paths(jobs).values()), sum(job.flops for job in jobs) / workers)


@given(trees(), st.integers(1, 4))
@settings(max_examples=300)
def test_a_schedule_trains_each_run_once_and_none_before_its_checkpoint(jobs: list[Job], workers: int) -> None:
    slots = {slot.job.route.name: slot for slot in simulate(jobs, workers)}
    assert slots.keys() == {job.route.name for job in jobs}
    for slot in slots.values():
        assert slot.end - slot.begin == slot.job.flops
        if slot.job.parent is not None:
            assert slot.begin >= slots[slot.job.parent].reaches(slot.job.start)
    for at in {slot.begin for slot in slots.values()}:
        assert sum(slot.begin <= at < slot.end for slot in slots.values()) <= workers
    makespan = max(slot.end for slot in slots.values())
    assert makespan >= bound(jobs, workers) * (1 - 1e-12)
    if workers == 1:
        assert makespan == sum(job.flops for job in jobs), "a single worker never waits"


@given(trees())
@settings(max_examples=200)
def test_with_a_worker_for_each_run_the_longest_path_is_the_time(jobs: list[Job]) -> None:
    """An independent reading of `longest_paths`: the recursion from the leaves against the schedule from the root."""
    makespan = max(slot.end for slot in simulate(jobs, len(jobs)))
    roots = [job.route.name for job in jobs if job.parent is None]
    assert makespan == pytest.approx(max(longest_paths(jobs)[name] for name in roots))


def test_eight_workers_on_a_real_tree_come_within_15_percent_of_the_bound() -> None:
    found = grid(read_study(SMALL))
    jobs = list(cheapest_tree([run.route for run in found.runs]).jobs)
    assert len(jobs) == 225
    makespan = max(slot.end for slot in simulate(jobs, 8))
    assert makespan <= 1.15 * bound(jobs, 8)


def test_the_longest_path_goes_first() -> None:
    jobs = [
        Job(route("short", ("a", 3)), None, 0),
        Job(route("trunk", ("b", 2)), None, 0),
        Job(route("branch", ("b", 2), ("c", 9)), "trunk", 2),
    ]
    assert longest_paths(jobs) == {"short": 3.0, "trunk": 9.0, "branch": 7.0}
    assert [slot.job.route.name for slot in simulate(jobs, 1)] == ["trunk", "branch", "short"]


def test_disk_holds_the_open_front_and_the_final_checkpoints() -> None:
    """One worker: the trunk's checkpoint at step 2 lives until the second of its branches is done."""
    jobs = [
        Job(route("trunk", ("a", 4)), None, 0),
        Job(route("b1", ("a", 2), ("b", 5)), "trunk", 2),
        Job(route("b2", ("a", 2), ("c", 5)), "trunk", 2),
    ]
    one = CHECKPOINT_BYTES * 100
    cost = forecast(jobs, dict.fromkeys(("trunk", "b1", "b2"), 100), 1, {name: set() for name in ("trunk", "b1", "b2")})
    assert cost.disk_at_end == 3 * one
    assert cost.disk == 4 * one, "the fork's and three final ones, in the moment before the fork's is removed"
    assert cost.makespan == cost.flops == 10
    assert cost.longest == 5
    kept = forecast(jobs, dict.fromkeys(("trunk", "b1", "b2"), 100), 1, {"trunk": {1, 2}, "b1": set(), "b2": {3}})
    assert kept.disk == kept.disk_at_end == 6 * one


def test_a_shared_step_is_trained_by_the_run_that_others_branch_from() -> None:
    begins = {"trunk": (None, 0), "branch": ("trunk", 6), "twig": ("branch", 8)}
    assert [trained_by(begins, "twig", step) for step in (1, 6, 7, 8, 9)] == [
        "trunk",
        "trunk",
        "branch",
        "branch",
        "twig",
    ]


def test_a_study_that_grows_branches_where_checkpoints_are_left() -> None:
    old = route("old", ("s", 50), ("cool", 60))
    longer = route("longer", ("s", 80), ("cool", 90))
    assert shared_steps(old, longer) == 50
    for steps, start in (((10, 30, 60), 30), ((50, 60), 50), ((60,), 0), ((), 0)):
        (job,) = cheapest_tree([longer], [Offer(old, steps)]).jobs
        assert (job.parent, job.start) == ("old" if start else None, start)
    early, late = cheapest_tree([longer, route("late", ("s", 85), ("c", 90))], [Offer(old, (30,))]).jobs
    assert (early.parent, early.start) == ("old", 30)
    assert (late.parent, late.start) == ("longer", 80), "the new run passes a later fork than the checkpoint"


def test_no_run_branches_from_one_at_a_step_before_that_begins() -> None:
    """A new run that itself branches from an offer has no checkpoints before its own start."""
    trunk = route("trunk", ("s", 80), ("cool", 100))
    first = route("first", ("s", 80), ("slow", 100))
    second = route("second", ("s", 60), ("end", 100))
    for steps, start in (((80,), 0), ((50, 80), 50), ((60, 80), 60)):
        tree = cheapest_tree([first, second], [Offer(trunk, steps)])
        assert [(job.parent, job.start) for job in tree.jobs] == [("trunk", 80), ("trunk" if start else None, start)]
        assert tree.kept == {"first": (), "second": ()}


def test_a_slot_says_when_its_checkpoint_exists() -> None:
    job = Job(route("r", ("s", 10)), "parent", 4)
    assert Slot(job, begin=100.0, end=106.0).reaches(7) == 103.0
