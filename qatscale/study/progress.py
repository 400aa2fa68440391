"""How far a study is, and how long the rest takes."""

from __future__ import annotations

from dataclasses import dataclass

from qatscale.study.folder import StudyFolder, StudyJob
from qatscale.study.state import StudyState


@dataclass(frozen=True)
class Progress:
    """How far a study is, for a table."""

    tokens_done: int
    tokens: int
    seconds_left: float | None
    """None before the first run is done, and while no worker trains."""


def progress(folder: StudyFolder, state: StudyState) -> Progress:
    """What is done, and how long the rest takes at the speed of the runs that are done.

    The estimate is the larger of two times: all work divided by the workers, and the longest chain of runs. Runs that
    failed or are blocked do not count.
    """
    jobs = folder.jobs
    steps = {name: state.step(name) for name in jobs if state.states[name].state in ("done", "running", "ready")}
    done = sum((steps[name] - jobs[name].start) * jobs[name].tokens_per_step for name in steps)
    work: dict[int, float] = {}
    left: dict[str, float] = {}
    for name, job in jobs.items():
        if state.states[name].state in ("running", "ready", "waiting"):
            tokens = (job.steps - max(steps.get(name, job.start), job.start)) * job.tokens_per_step
            left[name] = tokens * job.flops_per_token
            work[job.n_params] = work.get(job.n_params, 0.0) + left[name]
    speeds = _speeds(folder, state)
    workers = state.counts()["running"]
    seconds = None
    if workers and speeds and work:
        mean = sum(speeds.values()) / len(speeds)
        durations = {name: flops / speeds.get(jobs[name].n_params, mean) for name, flops in left.items()}
        seconds = max(sum(durations.values()) / workers, _longest(folder, durations))
    return Progress(done, sum(job.new_tokens for job in jobs.values()), seconds)


def _speeds(folder: StudyFolder, state: StudyState) -> dict[int, float]:
    """Model FLOPs a second of a worker by model size, of the runs that were trained in one piece."""
    flops: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for name, attempt in state.attempts.items():
        if attempt.state == "done" and attempt.number == 1 and attempt.ended is not None and name in folder.jobs:
            job = folder.jobs[name]
            flops[job.n_params] = flops.get(job.n_params, 0.0) + job.new_tokens * job.flops_per_token
            seconds[job.n_params] = seconds.get(job.n_params, 0.0) + attempt.ended - attempt.started
    return {size: flops[size] / max(seconds[size], 1e-9) for size in flops}


def _longest(folder: StudyFolder, durations: dict[str, float]) -> float:
    """Seconds of the longest chain of runs that are left. A run can start once its parent's checkpoint is written."""
    chains: dict[str, float] = {}
    for name, job in folder.jobs.items():
        if name in durations:
            chains[name] = durations[name] + (chains.get(job.parent, 0.0) * _share(folder, job) if job.parent else 0.0)
    return max(chains.values(), default=0.0)


def _share(folder: StudyFolder, job: StudyJob) -> float:
    """The part of its parent that has to be done before a run can start."""
    assert job.parent is not None
    parent = folder.jobs.get(job.parent)
    return 1.0 if parent is None else (job.start - parent.start) / max(1, parent.steps - parent.start)
