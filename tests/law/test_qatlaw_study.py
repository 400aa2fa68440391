"""The tree of a study against brute force and the timelines themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlaw.study import Piece, Route, Tree, cheapest_tree, shared_steps
from qatscale.schedule.difference import first_difference
from qatscale.study.file import read_study
from qatscale.study.grid import Grid, grid

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "analysis" / "studies" / "small.yaml"


def route(name: str, *pieces: tuple[str, int], root: str = "model") -> Route:
    """`pieces`: (rule, end)."""
    starts = [0, *(end for _, end in pieces)]
    return Route(
        name, root, tuple(Piece(rule, start, end) for start, (rule, end) in zip(starts, pieces, strict=False)), 10, 2.0
    )


@st.composite
def routes(draw: st.DrawFn) -> list[Route]:
    found = []
    for i in range(draw(st.integers(1, 7))):
        lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        ends = np.cumsum(lengths).tolist()
        pieces = [(draw(st.sampled_from("abc")), end) for end in ends]
        found.append(route(f"r{i}", *pieces, root=draw(st.sampled_from("xy"))))
    return found


def steps_of(one: Route) -> list[tuple[object, ...]]:
    """Every prefix of its steps, as (root, rules so far): what a step's training depends on."""
    rules = [piece.rule for piece in one.pieces for _ in range(piece.start, piece.end)]
    return [(one.root, *rules[: i + 1]) for i in range(len(rules))]


@given(routes())
@settings(max_examples=300)
def test_no_step_is_trained_twice_and_none_is_missing(found: list[Route]) -> None:
    """The least that must be trained is the set of different prefixes; the tree trains each of them once."""
    tree = cheapest_tree(found)
    needed = {prefix for one in found for prefix in steps_of(one)}
    assert tree.tokens == 10 * len(needed)
    assert tree.flops == 20.0 * len(needed)
    assert tree.tokens_alone == 10 * sum(one.steps for one in found)
    done: dict[str, list[tuple[object, ...]]] = {}
    trained: set[tuple[object, ...]] = set()
    for job in tree.jobs:
        own = steps_of(job.route)
        if job.parent is None:
            assert job.start == 0
        else:
            assert done[job.parent][: job.start] == own[: job.start], "the parent is there and has these steps"
            ends = len(done[job.parent])
            assert job.start == ends or job.start in tree.kept[job.parent]
            began = next(one.start for one in tree.jobs if one.route.name == job.parent)
            assert began < job.start, "the parent has trained the fork itself, and so has its checkpoint"
        new = own[job.start :]
        assert trained.isdisjoint(new)
        trained |= set(new)
        done[job.route.name] = own


def test_a_stable_phase_is_shared_up_to_the_shorter_end() -> None:
    long, short = (
        route("long", ("warm", 5), ("stable", 50), ("cool", 60)),
        route("short", ("warm", 5), ("stable", 20), ("c", 30)),
    )
    assert shared_steps(long, short) == shared_steps(short, long) == 20
    assert shared_steps(long, replace(short, root="another model")) == 0
    assert shared_steps(long, route("same", ("warm", 5), ("stable", 20))) == 20, "a run that the other passes through"


@pytest.fixture(scope="module")
def small() -> Grid:
    return grid(read_study(SMALL))


@pytest.fixture(scope="module")
def tree(small: Grid) -> Tree:
    return cheapest_tree([run.route for run in small.runs])


def test_the_trees_branches_are_those_that_the_timelines_allow(small: Grid, tree: Tree) -> None:
    """`first_difference` is what branching itself asks: nothing differs before a branch, something at it."""
    runs = {run.route.name: run for run in small.runs}
    assert len(tree.jobs) == len(runs)
    assert tree.tokens < 0.5 * tree.tokens_alone, "a stable trunk halves the compute, at least"
    for job in tree.jobs:
        if job.parent is None:
            continue
        parent, own = runs[job.parent], runs[job.route.name]
        assert first_difference(parent.timeline, own.timeline, job.start) is None
        assert parent.config.model == own.config.model
        assert parent.config.seed == own.config.seed
        if job.start < parent.timeline.steps:
            here, there = parent.timeline.at(job.start), own.timeline.at(job.start)
            bits_differ = here.quantized and parent.config.qat.bits != own.config.qat.bits
            phase = parent.timeline.segment_at(job.start), own.timeline.segment_at(job.start)
            assert here != there or bits_differ or phase[0].kind != phase[1].kind, "it could branch later"
        switched = parent.timeline.switch_step
        if switched is not None and switched < job.start:
            assert own.timeline.switch_step == switched
            assert own.config.qat.bits == parent.config.qat.bits


def test_who_shares_what(tree: Tree) -> None:
    """Widths share the full-precision cooldown of a sequential run; a longer run goes on with a shorter one's trunk."""
    jobs = {job.route.name: job for job in tree.jobs}
    first, second = (jobs[f"w64-8M-sequential-{bits}bit-f0.25"] for bits in (1, 2))
    switch = round(0.75 * 3906)
    assert (second.parent, second.start) == (first.route.name, switch)
    assert first.start < switch - 0.19 * switch, "the first one trained that cooldown"
    assert jobs["w64-4M-fp"].parent == "w64-2M-fp"
    assert jobs["w64-2M-fp"].parent is None
    assert sum(job.parent is None for job in tree.jobs) == 3 * (1 + 3), (
        "a trunk a size, and one of each width's scratch"
    )


def test_what_does_not_fit_is_left_out_and_told(small: Grid) -> None:
    """Fused with 10 % QAT has no room for a cooldown of 20 %."""
    names = [name for name, _ in small.left_out]
    assert len(names) == 3 * 3 * 3
    assert all("fused" in name and name.endswith("f0.1") for name in names)
    assert "qat.fraction >= 0.2" in small.left_out[0][1]


def test_a_warm_up_that_is_a_share_parts_runs_of_different_length(tmp_path: Path) -> None:
    text = SMALL.read_text().replace(
        "  - data.path=data/corpus", "  - schedule.warmup_tokens=null\n  - schedule.warmup_fraction=0.01"
    )
    (tmp_path / "study.yaml").write_text(text)
    found = grid(read_study(tmp_path / "study.yaml"))
    assert "schedule.warmup_tokens" in found.warnings[0]
    jobs = {job.route.name: job for job in cheapest_tree([run.route for run in found.runs]).jobs}
    assert jobs["w64-4M-fp"].parent is None
