"""The process groups of a layout, and this process's place and part of the model in it."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch.distributed as dist

from qatscale.config.schema import RunConfig
from qatscale.engine.layout import Layout, stages_of
from qatscale.engine.runtime import Runtime
from qatscale.model.tensor_parallel import TensorParallel


class Topology:
    """The groups of a job, made after `start_runtime`. Collective to make."""

    def __init__(self, config: RunConfig, layout: Layout, runtime: Runtime) -> None:
        assert layout.processes == runtime.ranks
        self.layout, self.place = layout, layout.place(runtime.rank)
        self.grid: Any = None
        """DeepSpeed's view of the groups; None where every process holds the entire model."""
        if layout.model_parallel:
            from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

            axes = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
            with contextlib.redirect_stdout(io.StringIO()):  # it prints itself
                self.grid = PipelineParallelGrid(topology=axes)
        group = self.grid.get_slice_parallel_group() if layout.tensor > 1 else None
        self.tensor = TensorParallel(self.place.tensor, layout.tensor, group, config.engine.sequence_parallel)
        self.stage = stages_of(config)[self.place.stage]


def gather_stages(item: Any, topology: Topology) -> list[Any]:
    """What each pipeline stage has of something, in order of the stages. Collective."""
    if topology.layout.pipeline == 1:
        return [item]
    found: list[Any] = [None] * topology.layout.pipeline
    dist.all_gather_object(found, item, group=topology.grid.get_pipe_parallel_group())
    return found
