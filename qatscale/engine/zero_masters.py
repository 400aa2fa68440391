"""Access to the fp32 masters and Adam states that this process holds under ZeRO.

ZeRO flattens parameters into fp32 partitions, one tensor per optimizer group and process. `ZeroMasters` shows them to
the QAT switch and the checkpoints as full parameters under their names in the entire model, whatever part of them a
process holds; no other module touches DeepSpeed's internals.
DeepSpeed's own `safe_*` functions are not enough: they fail on the last rank under ZeRO-3 where a size does not divide,
reach the optimizer state of the first group only under ZeRO-1/2, and never Adam's step count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qatscale.model.tensor_parallel import Shard, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A piece of a full parameter, at [offset, offset + numel) of an fp32 partition.

    It is elements [start, start + numel) of the flattened parameter; of the flattened columns `columns` (first, end) of
    it where tensor parallelism splits it by columns.
    """

    name: str
    parameter: nn.Parameter
    start: int
    numel: int
    partition: Tensor
    offset: int
    columns: tuple[int, int] | None = None
    saved: bool = True
    """Whether this process writes it to checkpoints: of several copies, one does."""

    def of(self, flat: Tensor) -> Tensor:
        """This fragment's view of the partition or of a tensor laid out like it."""
        return flat.narrow(0, self.offset, self.numel)

    def of_full(self, full: Tensor) -> Tensor:
        """This fragment's elements of a full parameter, flat; a view only where `columns` is None."""
        block = full if self.columns is None else full[:, slice(*self.columns)]
        return block.flatten().narrow(0, self.start, self.numel)


class ZeroMasters:
    """The fp32 masters and Adam states behind a DeepSpeed engine (ZeRO 1, 2 or 3).

    names: parameter → its name in the entire model.
    copies: names that another process writes to checkpoints, such as a tied head's on the last stage.
    """

    def __init__(self, engine: Any, names: dict[nn.Parameter, str], copies: Collection[str] = ()) -> None:
        self.zero = engine.optimizer
        self.adam: torch.optim.Optimizer = self.zero.optimizer
        self.stage: int = engine.zero_optimization_stage()
        self.device: torch.device = engine.device
        """Where collectives work: under offload the partitions lie on the CPU, which NCCL cannot reach."""
        assert self.stage in (1, 2, 3), f"ZeRO-{self.stage} keeps no fp32 partitions"
        self.names = {id(p): name for p, name in names.items() if p.requires_grad}
        self.shapes: dict[str, torch.Size] = {}
        """Name → shape of each full parameter of which this process holds a part."""
        self.fragments: list[Fragment] = []
        for p, name in names.items():
            if not p.requires_grad:
                continue
            shard = shard_of(p)
            local = torch.Size(p.ds_shape) if self.stage == 3 else p.shape  # type: ignore[attr-defined]
            self.shapes[name] = local if shard is None else shard.full_shape(local)
            fragment = self._stage3_fragment(name, p) if self.stage == 3 else self._fragment(name, p)
            if fragment is not None and shard is not None:
                fragment = _in_full(fragment, shard, local)
            if fragment is not None:
                self.fragments.append(replace(fragment, saved=name not in copies))

    def _fragment(self, name: str, parameter: Any) -> Fragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:  # other processes hold all of it
            return None
        partitions = (
            self.zero.fp32_groups_flat_partition  # bf16 with fp32 gradient accumulation under ZeRO-1
            if hasattr(self.zero, "fp32_groups_flat_partition")
            else self.zero.single_partition_of_fp32_groups
        )
        in_parameter, in_partition = mapping.lp_fragment_address, mapping.hp_fragment_address
        partition = partitions[mapping.param_group_index]
        return Fragment(name, parameter, in_parameter.start, in_parameter.numel, partition, in_partition.start)

    def _stage3_fragment(self, name: str, parameter: Any) -> Fragment | None:
        group, offset, share = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = share * self.zero._get_param_partition_rank(parameter)
        numel = min(share, parameter.ds_numel - start)  # the last process holds padding
        partition = self.zero.fp32_partitioned_groups_flat[group]
        return Fragment(name, parameter, start, numel, partition, offset) if numel > 0 else None

    def adam_state(self, partition: Tensor) -> dict[str, Tensor]:
        """Adam's state of a partition, made as Adam itself makes it where no step was taken yet."""
        state = self.adam.state[partition]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(partition)
        return state

    def steps_taken(self, partition: Tensor) -> int:
        """Adam's step count of a partition; 0 before the first step."""
        state = self.adam.state.get(partition)
        return int(state["step"]) if state else 0

    # --- the three methods of quant.plugin.Masters ---

    def full(self, parameter: nn.Parameter) -> Tensor:
        """The full fp32 master, on every process that holds some of it. Collective."""
        return self.full_all([parameter])[0]

    @torch.no_grad()
    def full_all(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The full fp32 master of each of several parameters, in one exchange. Collective."""
        names = [self.names[id(p)] for p in parameters]
        shards = {name: shard for name, p in zip(names, parameters, strict=True) if (shard := shard_of(p))}
        in_turn = sorted(names, key=lambda name: name not in shards)
        sizes = [self.shapes[name].numel() for name in in_turn]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        masters = {n: part.view(self.shapes[n]) for n, part in zip(in_turn, flat.split(sizes), strict=True)}
        for fragment in self.fragments:
            if fragment.name not in masters:
                continue
            full, own = masters[fragment.name], fragment.of(fragment.partition)
            if fragment.columns is None:
                fragment.of_full(full).copy_(own)
            else:
                block = full[:, slice(*fragment.columns)]
                part = torch.zeros(block.numel(), dtype=full.dtype, device=full.device)
                part.narrow(0, fragment.start, fragment.numel).copy_(own)
                block.copy_(part.view(block.shape))
        # Every element is held by exactly one process of these groups: a sum with zeros is exact.
        torch.distributed.all_reduce(flat, group=self.zero.dp_process_group)
        if shards:
            shard = next(iter(shards.values()))
            shard.parallel.all_reduce(flat[: sum(self.shapes[name].numel() for name in shards)])
        return [masters[name] for name in names]

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the master and the working copy to `value`, the full parameter, given on every process."""
        name, shard = self.names[id(parameter)], shard_of(parameter)
        if value.shape != self.shapes[name]:
            raise ValueError(f"{name} has shape {tuple(self.shapes[name])}, the value {tuple(value.shape)}")
        for fragment in self.fragments:
            if fragment.name == name:
                fragment.of(fragment.partition).copy_(fragment.of_full(value))
                if self.stage == 3:
                    self._write_stage3_shard(fragment)
        local = value if shard is None else shard.take(value)
        if parameter.data.numel() == local.numel():  # under ZeRO-3: only those that stay resident
            parameter.data.copy_(local)

    def _write_stage3_shard(self, fragment: Fragment) -> None:
        shard: Tensor = fragment.parameter.ds_tensor  # type: ignore[attr-defined]
        shard.data.narrow(0, 0, fragment.numel).copy_(fragment.of(fragment.partition))

    @torch.no_grad()
    def reset_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Zero the moments and the step count of the optimizer groups that hold exactly these parameters."""
        wanted = {self.names[id(p)] for p in parameters}
        for partition, fragments in self.by_partition().items():
            held = {fragment.name for fragment in fragments}
            if not held & wanted:
                continue
            if not held <= wanted:
                few = ", ".join(sorted(held - wanted)[:3])
                raise ValueError(
                    f"one optimizer group mixes scales, whose state is reset, with {few} ...; build the optimizer from "
                    "QatPlugin.parameter_groups, in the Trainer with optimizer_cls_and_kwargs=QatCallback.adamw(lr)"
                )
            for value in self.adam_state(partition).values():
                value.zero_()

    # --- for checkpoints ---

    def by_partition(self) -> dict[Tensor, list[Fragment]]:
        held: dict[Tensor, list[Fragment]] = {}
        for fragment in self.fragments:
            held.setdefault(fragment.partition, []).append(fragment)
        return held

    @torch.no_grad()
    def refresh_working_copies(self) -> None:
        """Copy the masters, after they were written, into the weights that the forward pass uses. Collective."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for fragment in self.fragments:
            self._write_stage3_shard(fragment)
        for parameter in self.zero.persistent_parameters:
            if parameter.data.numel() == parameter.ds_numel:  # resident by now; else the first use gathers it
                full, shard = self.full(parameter), shard_of(parameter)
                parameter.data.copy_(full if shard is None else shard.take(full))


def _in_full(fragment: Fragment, shard: Shard, local: torch.Size) -> Fragment | None:
    """A fragment of a process's part, as one of the full parameter; None where it is only padding."""
    if shard.dim == 1:
        return replace(fragment, columns=(shard.start, shard.start + shard.size))
    row = local[1:].numel()
    numel = min(fragment.numel, shard.size * row - fragment.start)
    return replace(fragment, start=shard.start * row + fragment.start, numel=numel) if numel > 0 else None
