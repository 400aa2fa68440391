"""The process groups of a layout, and this process's place and part of the model in it."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from qatscale.config.schema import RunConfig
from qatscale.engine.layout import Layout, Place, stages_of
from qatscale.engine.runtime import Runtime
from qatscale.model.stages import Stage
from qatscale.model.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class Topology:
    layout: Layout
    place: Place
    tensor: TensorParallel
    stage: Stage
    grid: Any
    """DeepSpeed's view of the groups; None where every process holds the entire model."""


def join_topology(config: RunConfig, layout: Layout, runtime: Runtime) -> Topology:
    """Make the groups. Collective, after `start_runtime`."""
    assert layout.processes == runtime.ranks
    place, grid = layout.place(runtime.rank), None
    if layout.model_parallel:
        from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

        axes = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints itself
            grid = PipelineParallelGrid(topology=axes)
    group = grid.get_slice_parallel_group() if grid and layout.tensor > 1 else None
    tensor = TensorParallel(place.tensor, layout.tensor, group, config.engine.sequence_parallel)
    return Topology(layout, place, tensor, stages_of(config)[place.stage], grid)


def gather_stages(item: Any, topology: Topology) -> list[Any]:
    """What each pipeline stage has of something, in order of the stages. Collective."""
    if topology.layout.pipeline == 1:
        return [item]
    found: list[Any] = [None] * topology.layout.pipeline
    dist.all_gather_object(found, item, group=topology.grid.get_pipe_parallel_group())
    return found
