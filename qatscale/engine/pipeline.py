"""A pipeline stage as DeepSpeed's PipelineEngine takes it.

DeepSpeed divides a list of layers, builds those of its own stage and renames their parameters by position. Here the
model divides itself (`qatscale.model.stages`) and keeps its names, so that the switch, the optimizer groups and the
checkpoints do not know about stages; what is left of PipelineModule is its communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe import PipelineModule
from torch import Tensor, nn

from qatscale.engine.topology import Topology
from qatscale.model.llama import Llama


class LlamaPipeline(PipelineModule):
    """One stage of a Llama: a PipelineModule of a single layer, the stage."""

    def __init__(self, model: Llama, topology: Topology) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.loss_fn = None  # the last stage returns the loss itself
        self.micro_batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        """(tokens, labels) of the micro-batches whose forward passes are next."""
        self._grid = topology.grid
        self._topo = topology.grid.topology()
        self.num_stages = topology.layout.pipeline
        self.stage_id = topology.stage.index
        self.global_rank = dist.get_rank()
        self._local_start, self._local_stop = topology.stage.blocks.start, topology.stage.blocks.stop
        self.activation_checkpoint_interval = 0  # the model recomputes by itself
        self.activation_checkpoint_func: Any = None
        self.dynamic_shape = False
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False
        self.tied_comms = self._tie_ends(model, topology) if model.config.tied_embedding else {}

    def _tie_ends(self, model: Llama, topology: Topology) -> dict[str, dict[str, Any]]:
        """The first stage's embedding and the last one's head are one table: their gradients are summed every step."""
        mine: dict[str, dict[str, Any]] = {}
        for data in range(topology.layout.data):
            for tensor in range(topology.layout.tensor):
                ranks = [self._topo.get_rank(pipe=stage, data=data, model=tensor) for stage in (0, self.num_stages - 1)]
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    table = model.embed if topology.stage.is_first else model.head
                    names = [name for name, _ in table.named_parameters()]  # the weight, and its scale
                    mine["table"] = {"ranks": ranks, "group": group, "weight_attr": names, "module": table}
        if mine and not topology.stage.is_first:
            for parameter in mine["table"]["module"].parameters():
                parameter.ds_pipe_replicated = True  # so that the gradient norm counts it once
        return mine

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Those that have a gradient: before the switch the scale has none, on neither stage."""
        tied = [(getattr(t["module"], name), t["group"]) for t in self.tied_comms.values() for name in t["weight_attr"]]
        return [(p, group) for p, group in tied if p.grad is not None or hasattr(p, "_hp_grad")]

    def forward(self, x: Tensor) -> Tensor:
        """The stream [b, t, D] behind this stage's blocks; on the last stage the loss, an fp32 scalar.

        DeepSpeed passes a stage neither labels nor tokens. In all its schedules, though, the forward passes of a stage
        come in the order of the micro-batches, which every process has read. (With a loss function of DeepSpeed's the
        head would have to run outside of `forward`, and in bf16 its gradient would be lost: all gradients are cleared
        when that of forward's output arrives.)
        """
        tokens, labels = next(self.micro_batches)
        return self.model(x, labels if self.model.stage.is_last else None, tokens)
