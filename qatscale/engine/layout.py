"""How the processes of a job divide the work: data x tensor x pipeline.

Pure arithmetic, decided before the processes meet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from qatscale.config.schema import RunConfig
from qatscale.errors import UserError
from qatscale.model.stages import Stage, divide


class Place(NamedTuple):
    """A process's coordinates. Those of one model have the same `data`, the share of the batch that they see."""

    stage: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Ranks count through tensor first, then data, then stages: those that exchange most are neighbours."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def processes(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def model_parallel(self) -> bool:
        """Whether one process holds less than the entire model."""
        return self.tensor * self.pipeline > 1

    def place(self, rank: int) -> Place:
        return Place(rank // (self.tensor * self.data), rank // self.tensor % self.data, rank % self.tensor)

    def __str__(self) -> str:
        return f"{self.data} data x {self.tensor} tensor x {self.pipeline} pipeline"


def job_size(unlaunched: int = 1) -> int:
    """Processes of the job, before they have met: WORLD_SIZE. unlaunched: the number without a launcher."""
    given = os.environ.get("WORLD_SIZE", str(unlaunched))
    if not given.isdecimal() or not int(given):
        raise UserError("WORLD_SIZE", given, "is not a number of processes.", "A launcher sets it.")
    return int(given)


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    return divide(config.model, config.engine.pipeline_stages)
