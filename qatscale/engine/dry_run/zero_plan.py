"""The settings of a ds_config that decide about memory and traffic, and how ZeRO-1 and 2 divide parameters."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qatscale.config.ds_config import precision_of

FP32 = 4
"""Bytes of an element."""


@dataclass(frozen=True)
class ZeroPlan:
    """With DeepSpeed 0.19.8's defaults for what a ds_config leaves out.

    Bytes of an element: `weight`, `accumulated` gradient, `reduced` (communicated) gradient.
    """

    stage: int
    weight: int
    accumulated: int
    reduced: int
    bucket: int
    contiguous: bool
    """Whether gradients are copied into a buffer of that size to be reduced, or stay where they are."""
    buckets: int
    """Two where communication overlaps with backward, one after the other is filled."""
    offloads: bool
    """Optimizer state to the host; with `offloads_weights` ZeRO-3's shards of the weights too."""
    offloads_weights: bool
    prefetch: int
    most_live: int
    """ZeRO-3: elements gathered ahead with every use of a matrix, and up to how many in all."""
    persists_up_to: int
    """ZeRO-3: parameters of up to so many elements stay whole."""
    persists_in_all: int
    reuse_distance: int
    sub_group: int
    data: int
    """Processes that share gradients and states."""

    @property
    def keeps_fp32_gradients(self) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer (`engine.py`, `_do_optimizer_sanity_check`)."""
        return self.stage == 1 and self.weight != FP32 and self.accumulated == FP32 and not self.offloads


def zero_plan(ds: Mapping[str, Any], data: int) -> ZeroPlan:
    """Of a checked ds_config, before or after `merge_ds_config`."""
    zero = ds["zero_optimization"]
    size = {"fp32": FP32, "bf16": 2}
    weight = size[precision_of(ds)]
    accumulated = size[ds.get("data_types", {}).get("grad_accum_dtype", "fp32")]
    return ZeroPlan(
        stage=zero["stage"],
        weight=weight,
        accumulated=max(weight, accumulated),
        reduced=size[ds.get("communication_data_type", "fp32")],
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        contiguous=zero.get("contiguous_gradients", True),
        buckets=2 if zero.get("overlap_comm", False) and zero["stage"] < 3 else 1,
        offloads=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offloads_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        most_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        persists_up_to=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        persists_in_all=int(zero.get("stage3_model_persistence_threshold", sys.maxsize)),
        reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
        sub_group=int(zero.get("sub_group_size", 1e9)),
        data=data,
    )


@dataclass(frozen=True)
class Partition:
    """A process's part of an optimizer group that ZeRO-1 and 2 flatten: of several processes, the one with the most."""

    size: int
    whole: int
    """Elements of all parameters that it has any of."""
    largest: int
    """Of its pieces."""


def partition(numels: list[int], data: int) -> Partition:
    """The flat group is padded to a multiple of 2 x `data` and cut into equal parts; parameters may lie across cuts."""
    size = -(-sum(numels) // (2 * data)) * 2
    best, start = Partition(size, 0, 0), 0
    whole: dict[int, int] = {}
    largest: dict[int, int] = {}
    for numel in numels:
        for owner in range(start // size, min((start + numel - 1) // size, data - 1) + 1):
            whole[owner] = whole.get(owner, 0) + numel
            piece = min(start + numel, (owner + 1) * size) - max(start, owner * size)
            largest[owner] = max(largest.get(owner, 0), piece)
        start += numel
    for owner, elements in whole.items():
        if elements > best.whole:
            best = Partition(size, elements, largest[owner])
    return best
