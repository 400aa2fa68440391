"""From a prepared model without memory to a DeepSpeed engine: weights, optimizer groups, AdamW, ZeRO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from qatscale.config.ds_config import precision_of
from qatscale.config.schema import RunConfig
from qatscale.engine.topology import Topology, gather_stages
from qatscale.engine.zero_masters import ZeroMasters
from qatscale.errors import UserError, first_invalid
from qatscale.model.initial_weights import InitialWeights, constant
from qatscale.model.llama import Llama, canonical_name
from qatscale.model.tensor_parallel import shard_of
from qatscale.quant.plugin import QatPlugin


@torch.no_grad()
def place_parameters(
    model: Llama,
    weights: InitialWeights,
    ds_config: dict[str, Any],
    topology: Topology,
    device: torch.device,
    *,
    draw: bool,
) -> None:
    """Give a prepared model on the meta device its memory, in the run's precision, and its initial weights. Collective.

    Each number is drawn by one process of a data-parallel group. ZeRO-3's processes draw and keep their share, one
    parameter after the other; otherwise each draws some parameters for all. draw: False leaves matrices zero, for a
    checkpoint.
    """
    model.to(torch.bfloat16 if precision_of(ds_config) == "bf16" else torch.float32)
    names = {p: canonical_name(name, model.config) for name, p in model.named_parameters()}
    group: Any = topology.grid.get_data_parallel_group() if topology.grid else dist.group.WORLD
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def fill(parameter: nn.Parameter, start: int = 0, end: int | None = None) -> None:
        if draw or constant(names[parameter]) is not None:
            weights.fill(parameter, names[parameter], start, end)

    zero = ds_config["zero_optimization"]
    if zero["stage"] == 3:
        from deepspeed.runtime.zero import Init

        class Divided(Init):
            """DeepSpeed's division of a model, without its broadcast of every parameter from the first process."""

            def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
                for parameter in param_list:
                    _materialise(parameter, device)
                    share = -(-parameter.numel() // ranks)
                    start, end = (min(place * share, parameter.numel()) for place in (rank, rank + 1))
                    parameter.view(-1)[start:end].zero_()  # the rest is nobody's here: on CPU it takes no memory
                    fill(parameter, start, end)
                    self._convert_to_deepspeed_param(parameter)
                    parameter.partition()

        mpu = topology.grid
        Divided(model, mpu and group, dtype=next(iter(names)).dtype, config_dict_or_path=ds_config, mpu=mpu)
        return
    for turn, parameter in enumerate(names):
        _materialise(parameter, device)
        parameter.zero_()
        if turn % ranks == rank:
            fill(parameter)
    for turn, parameter in enumerate(names):
        dist.broadcast(parameter.data, dist.get_global_rank(group, turn % ranks), group)


def _materialise(parameter: nn.Parameter, device: torch.device) -> None:
    """Memory for a meta tensor, not initialised. The Parameter stays the same object and keeps its attributes."""
    real = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
    real.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, real)


def initialize_engine(
    model: nn.Module, plugin: QatPlugin, config: RunConfig, ds_config: dict[str, Any], topology: Topology
) -> tuple[Any, ZeroMasters]:
    """The DeepSpeed engine of a prepared model, and its masters. `ds_config`: merged. Collective."""
    import deepspeed
    from deepspeed.utils import groups

    groups_of_parameters = plugin.optimizer_groups()
    _equal_counts(groups_of_parameters, topology)
    adam = torch.optim.AdamW(
        groups_of_parameters, lr=config.optimizer.learning_rate, betas=config.optimizer.betas,
        eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay, fused=True,
    )  # fmt: skip
    names = {p: canonical_name(name, config.model) for name, p in model.named_parameters()}
    copies: set[str] = set()
    module, mpu = model, None
    if topology.layout.model_parallel:
        mpu = topology.grid
        if topology.place.tensor:  # the first of a tensor-parallel group saves what all of it hold undivided
            copies |= {name for p, name in names.items() if shard_of(p) is None}
        if not topology.stage.is_first:  # a tied head
            copies |= {name for name in names.values() if name.startswith("embed.")}
    if topology.layout.pipeline > 1:
        from qatscale.engine.pipeline import LlamaPipeline

        assert isinstance(model, Llama)
        module, mpu = LlamaPipeline(model, topology), None  # it has the grid
        # By default DeepSpeed has each process of a tensor-parallel group send its part of what all of them hold alike;
        # where the sequence is split they hold different things.
        alike = not topology.tensor.sequence
        section = {"pipe_partitioned": alike, "grad_partitioned": alike, **ds_config.get("pipeline", {})}
        ds_config = {**ds_config, "pipeline": section}
    groups.mpu = mpu  # DeepSpeed keeps that of an earlier engine of the same process
    try:
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=adam, config=ds_config, mpu=mpu, dist_init_required=False
        )  # fmt: skip
    except ValidationError as error:  # of a section that it alone knows
        raise UserError("engine.ds_config", config.engine.ds_config, f"{first_invalid(error)}.") from None
    masters = ZeroMasters(engine, names, copies)
    assert all(masters.steps_taken(p) == 0 for p in masters.by_partition()), "the optimizer stepped before training"
    return engine, masters


def _equal_counts(groups_of_parameters: list[dict[str, Any]], topology: Topology) -> None:
    """DeepSpeed sums the gradient norm over the stages group by group, and hangs where a stage has fewer groups.

    A stage without the embedding's scales gives single matrices a group of their own. Collective.
    """
    missing = max(gather_stages(len(groups_of_parameters), topology)) - len(groups_of_parameters)
    matrices = groups_of_parameters[0]
    for _ in range(missing):
        groups_of_parameters.append({**matrices, "params": [matrices["params"].pop()]})
