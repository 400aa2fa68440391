"""What each run of a study is doing, and which one a worker takes next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

from qatlaw.study import longest_paths, next_job
from qatscale.engine.checkpoints.folders import MANIFEST
from qatscale.study.folder import StudyFolder, StudyJob
from qatscale.supervise.claims import Attempt
from qatscale.tracking.records import Tail
from qatscale.tracking.store import Cursor

MAX_DEATHS = 5
"""Workers that may die in the same run before the run counts as failed."""

State = Literal["done", "running", "ready", "waiting", "failed", "blocked"]
"""`ready`: can start or continue. `waiting`: for a checkpoint of its parent. `blocked`: its parent failed before it."""


@dataclass(frozen=True)
class JobState:
    state: State
    attempt: int
    """Number of the latest attempt, 0 without one."""
    reason: str = ""
    """Why it failed or was stopped, or which run blocks it."""


class StudyState:
    """The states of all runs, read from the folder again by `refresh`."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self.states: dict[str, JobState] = {}
        self._done: set[str] = set()
        self._recorded: tuple[float, set[str]] = (-1.0, set())
        self.attempts: dict[str, Attempt] = {}
        self._jobs: dict[str, StudyJob] = {}
        self._longest: dict[str, float] = {}
        """FLOPs of the longest path below each run."""
        self._tails: dict[str, Tail] = {}
        self._steps: dict[str, int] = {}

    def refresh(self) -> Mapping[str, JobState]:
        jobs = self.folder.jobs
        if jobs is not self._jobs:
            self._jobs, self._longest = jobs, longest_paths([job.as_tree_job() for job in jobs.values()])
        self.attempts = self.folder.claims.attempts()
        self._done |= {name for name in jobs if name not in self._done and self.folder.run(name).is_done}
        changed = self.folder.results.stat().st_mtime if self.folder.results.exists() else 0.0
        if changed != self._recorded[0]:
            self._recorded = (changed, self.folder.recorded())
        states: dict[str, JobState] = {}
        for name, job in jobs.items():  # parents come first
            states[name] = self._state(job, states)
        self.states = states
        return states

    def _state(self, job: StudyJob, before: Mapping[str, JobState]) -> JobState:
        attempt = self.attempts.get(job.name, Attempt(state="released"))
        number = attempt.number
        if job.name in self._done or job.name in self._recorded[1]:
            return JobState("done", number)
        if attempt.state == "running" or attempt.state == "failed":
            return JobState(attempt.state, number, attempt.reason)
        if attempt.state == "gone" and self._deaths(job.name) >= MAX_DEATHS:
            return JobState("failed", number, f"{MAX_DEATHS} workers died in it (out of memory?)")
        if job.parent is None or self._has_checkpoint(job):
            return JobState("ready", number, attempt.reason)
        parent = before.get(job.parent)
        if parent is None or parent.state == "done":
            reason = f"its parent's checkpoint {job.parent}@{job.start} is gone"
            return JobState("blocked", number, reason)
        if parent.state in ("failed", "blocked"):
            return JobState("blocked", number, parent.reason if parent.state == "blocked" else f"{job.parent} failed")
        return JobState("waiting", number)

    def _has_checkpoint(self, job: StudyJob) -> bool:
        """Whether it can start from its parent's checkpoint, or continue from its own."""
        assert job.parent is not None
        if (self.folder.checkpoint(job.parent, job.start) / MANIFEST).exists():
            return True
        return any((self.folder.runs / job.name / "checkpoints").glob(f"step-*/{MANIFEST}"))

    def _deaths(self, name: str) -> int:
        return sum(attempt.state == "gone" for attempt in self.folder.claims.history(name))

    def next_job(self) -> StudyJob | None:
        """The run that a free worker takes; None if none can start now."""
        ready = [name for name, state in self.states.items() if state.state == "ready"]
        name = next_job(ready, self._longest)
        return None if name is None else self._jobs[name]

    @property
    def may_go_on(self) -> bool:
        """Whether an idle worker may get a run later."""
        return any(state.state in ("ready", "waiting", "running") for state in self.states.values())

    def counts(self) -> dict[State, int]:
        held = Counter(state.state for state in self.states.values())
        return {state: held[state] for state in get_args(State)}

    def failures(self) -> dict[str, str]:
        """Failed run → why."""
        return {name: one.reason for name, one in self.states.items() if one.state == "failed"}

    def refusals(self) -> dict[str, list[str]]:
        """Why MLflow refused runs → their names."""
        refusals: dict[str, list[str]] = {}
        for name in self.states:
            cursor = Cursor.load(self.folder.run(name))
            if cursor is not None and cursor.refused:
                refusals.setdefault(cursor.error or "", []).append(name)
        return refusals

    def step(self, name: str) -> int:
        """Optimizer steps that a run has done, by its metrics file; its first step before the first record."""
        job = self.folder.jobs[name]
        if self.states[name].state == "done":
            return job.steps
        tail = self._tails.setdefault(name, Tail(self.folder.run(name).metrics_file))
        with suppress(OSError, ValueError):  # who reads the run reports a damaged line
            for record in tail:
                self._steps[name] = record.get("step", job.start)
        return self._steps.get(name, job.start)


@dataclass(frozen=True)
class Progress:
    """How far a study is, for a table."""

    tokens_done: int
    tokens: int
    seconds_left: float | None
    """None before the first run is done, and while no worker trains."""


def progress(state: StudyState) -> Progress:
    """What is done, and how long the rest takes with the workers that train now, at the speed of the finished runs.

    Runs that failed or are blocked do not count.
    """
    jobs = state.folder.jobs
    left: dict[int, float] = {}  # model FLOPs by model size
    done = 0
    for name, job in jobs.items():
        now = state.states[name].state
        step = max(job.start, state.step(name)) if now in ("done", "running", "ready") else job.start
        done += (step - job.start) * job.tokens_per_step
        if now in ("running", "ready", "waiting"):
            flops = (job.steps - step) * job.tokens_per_step * job.flops_per_token
            left[job.n_params] = left.get(job.n_params, 0.0) + flops
    speeds, workers = _speeds(state), state.counts()["running"]
    seconds = None
    if workers and speeds and left:
        mean = sum(speeds.values()) / len(speeds)
        seconds = sum(flops / speeds.get(size, mean) for size, flops in left.items()) / workers
    return Progress(done, sum(job.new_tokens for job in jobs.values()), seconds)


def _speeds(state: StudyState) -> dict[int, float]:
    """Model FLOPs a second of a worker by model size, of the runs that were trained in one piece."""
    flops: dict[int, float] = {}
    seconds: dict[int, float] = {}
    jobs = state.folder.jobs
    for name, attempt in state.attempts.items():
        if attempt.state == "done" and attempt.number == 1 and attempt.ended is not None and name in jobs:
            job = jobs[name]
            flops[job.n_params] = flops.get(job.n_params, 0.0) + job.new_tokens * job.flops_per_token
            seconds[job.n_params] = seconds.get(job.n_params, 0.0) + attempt.ended - attempt.started
    return {size: flops[size] / max(seconds[size], 1e-9) for size in flops}
