"""What a study will cost: work, time with some workers, disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qatlaw.study import Job, longest_paths, simulate

CHECKPOINT_BYTES = 12
"""A parameter in a checkpoint: the weight and Adam's two moments, in fp32."""


@dataclass(frozen=True)
class Forecast:
    """Cost of a tree of runs, with all workers equally fast."""

    workers: int
    flops: float
    longest: float
    """FLOPs of the longest chain of runs: no number of workers ends sooner."""
    makespan: float
    """FLOPs of one worker until the last run is done."""
    disk: int
    """Bytes of checkpoints at the fullest moment."""
    disk_at_end: int
    """Bytes of the final checkpoints, which stay."""


def forecast(jobs: Sequence[Job], parameters: Mapping[str, int], workers: int) -> Forecast:
    """`jobs`: each after the one it branches from. `parameters`: of each job's model, by the job's name."""
    slots = {slot.job.route.name: slot for slot in simulate(jobs, workers)}
    sizes = {name: count * CHECKPOINT_BYTES for name, count in parameters.items()}
    needed_until: dict[tuple[str, int], float] = {}  # a checkpoint stays until the last run that branches there is done
    for job in jobs:
        if job.parent in slots and job.start < slots[job.parent].job.route.steps:
            key = (job.parent, job.start)
            needed_until[key] = max(needed_until.get(key, 0.0), slots[job.route.name].end)
    changes = [(slot.end, sizes[name]) for name, slot in slots.items()]
    for (parent, step), end in needed_until.items():
        changes += [(slots[parent].reaches(step), sizes[parent]), (end, -sizes[parent])]
    held, most = 0, 0
    for _, change in sorted(changes, key=lambda pair: (pair[0], -pair[1])):
        held += change
        most = max(most, held)
    return Forecast(
        workers=workers,
        flops=sum(job.flops for job in jobs),
        longest=max(longest_paths(jobs).values()),
        makespan=max(slot.end for slot in slots.values()),
        disk=most,
        disk_at_end=held,
    )
