"""Host memory of one node, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from qatscale.config.schema import RunConfig
from qatscale.engine.estimate.local_sizes import LocalSizes
from qatscale.engine.estimate.memory import between_steps
from qatscale.engine.estimate.traffic import GPUS_A_NODE
from qatscale.engine.estimate.zero import FP32, ZeroSettings, partition
from qatscale.engine.layout import Layout

LIBRARIES = 850_000_000
"""Bytes of a process without its tensors: Python, torch, DeepSpeed, MLflow, batches. Measured on CPU: 0.77 to 0.84 GB
(analysis/benchmarks/memory_estimate.md). CUDA's own host memory comes on top and is not known here."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a node. Token shards are memory-mapped: the system drops their pages when others need the memory."""

    processes: int
    libraries: int
    start: int
    """While each process builds its share of the model in fp32 and draws one parameter at a time."""
    checkpoint: int
    """The copy from which `checkpoint.background` writes: 12 bytes a parameter, page-locked with a GPU."""
    offloaded: int

    @property
    def total(self) -> int:
        return self.libraries + max(self.start, self.checkpoint + self.offloaded)

    @property
    def when(self) -> str:
        """When the total is reached."""
        return "at the start" if self.start > self.checkpoint + self.offloaded else "in training"


def host_memory(config: RunConfig, layout: Layout, stages: list[LocalSizes], zero: ZeroSettings) -> HostMemory:
    """The memory of a node whose processes all hold what the fullest stage's do."""
    processes = min(GPUS_A_NODE, layout.processes)
    drawn = config.model.vocab_size * config.model.hidden_size
    copied = 3 * FP32 if config.checkpoint.background else 0

    def state(local: LocalSizes) -> int:
        return copied * sum(partition(group, zero) for group in local.groups.values())

    return HostMemory(
        processes=processes,
        libraries=processes * LIBRARIES,
        start=processes * FP32 * max(local.weights + local.scales + drawn for local in stages),
        checkpoint=processes * max(state(local) for local in stages),
        offloaded=processes * max(between_steps(local, zero)["host"] for local in stages),
    )
