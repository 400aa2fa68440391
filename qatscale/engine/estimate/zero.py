"""What ZeRO keeps of parameters and gradients, from the settings of a ds_config.

ZeRO's table (arXiv 1910.02054, section 5) divides optimizer state, then gradients, then weights by the data-parallel
processes. DeepSpeed 0.19.8 adds flat copies and buckets to it (`runtime/bf16_optimizer.py`, `runtime/zero`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qatscale.config.ds_config import precision_of

FP32 = 4
"""Bytes of an element."""
_BF16_BUCKET = 500_000_000
"""Elements of a bucket of the BF16_Optimizer: `MEMORY_OPT_ALLREDUCE_SIZE` of DeepSpeed's `runtime/engine.py`."""
Group = Mapping[int, int]
"""An optimizer group: elements of a parameter → number of such parameters."""


@dataclass(frozen=True)
class ZeroSettings:
    """With DeepSpeed's defaults for what a ds_config leaves out.

    Bytes of an element: `weight`, `accumulated` gradient, `reduced` (communicated) gradient. Other sizes in elements.
    """

    stage: int
    data: int
    """Processes that share gradients and states."""
    weight: int
    accumulated: int
    reduced: int
    bucket: int
    contiguous: bool
    """Gradients are copied into a buffer of `bucket` elements to be reduced."""
    overlaps: bool
    """Gradients are reduced while backward goes on, with two buckets in turns."""
    offloads: bool
    """Optimizer state lives on the host; with `offloads_weights` ZeRO-3's shards of the weights too."""
    offloads_weights: bool
    prefetches: bool
    most_gathered: int
    """ZeRO-3 holds gathered weights of up to so many elements: prefetched, or kept for their use in backward."""
    persists: int
    """ZeRO-3 leaves parameters of up to so many elements undivided."""
    sub_group: int

    @property
    def keeps_fp32_gradients(self) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer (`runtime/engine.py`, `_do_optimizer_sanity_check`)."""
        return self.stage == 1 and self.weight != FP32 and self.accumulated == FP32 and not self.offloads


def zero_settings(ds: Mapping[str, Any], data: int) -> ZeroSettings:
    """The settings of a checked ds_config, before or after `merge_ds_config`."""
    zero = ds["zero_optimization"]
    size = {"fp32": FP32, "bf16": 2}
    weight = size[precision_of(ds)]
    prefetches = zero.get("stage3_prefetch_bucket_size", 5e7) > 0
    most_live, reused = zero.get("stage3_max_live_parameters", 1e9), zero.get("stage3_max_reuse_distance", 1e9)
    return ZeroSettings(
        stage=zero["stage"],
        data=data,
        weight=weight,
        accumulated=max(weight, size[ds.get("data_types", {}).get("grad_accum_dtype", "fp32")]),
        reduced=size[ds.get("communication_data_type", "fp32")],
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        contiguous=zero.get("contiguous_gradients", True),
        overlaps=zero.get("overlap_comm", zero["stage"] == 3),
        offloads=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offloads_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        prefetches=prefetches,
        most_gathered=int(max(most_live if prefetches else 0, reused / 2)),
        persists=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        sub_group=int(zero.get("sub_group_size", 1e9)),
    )


class Resident(NamedTuple):
    """Bytes that a process holds of an optimizer group between steps. `optimizer`: fp32 masters and two moments."""

    weights: int
    gradients: int
    optimizer: int
    host: int


def partition(group: Group, zero: ZeroSettings) -> int:
    """Elements of a process's part. ZeRO-1 and 2 flatten the group, pad it to a multiple of 2 x data and cut it."""
    if zero.stage == 3:
        return sum(-(-numel // zero.data) * count for numel, count in group.items())
    return -(-_elements(group) // (2 * zero.data)) * 2


def undivided(group: Group, zero: ZeroSettings) -> int:
    """Elements that ZeRO-3 leaves undivided."""
    return sum(n * count for n, count in group.items() if n <= zero.persists) if zero.data > 1 else 0


def gathered(groups: Mapping[str, Group], zero: ZeroSettings) -> tuple[int, int]:
    """(elements that ZeRO-3 divides, and so gathers for each use; of them those that stay gathered until backward)."""
    if zero.stage < 3 or zero.data == 1:
        return 0, 0
    divided = sum(_elements(group) - undivided(group, zero) for group in groups.values())
    return divided, min(divided, zero.most_gathered)


def resident(group: Group, zero: ZeroSettings) -> Resident:
    part = partition(group, zero)
    states, masters, low = 3 * FP32 * part, FP32 * part, zero.weight * part
    if zero.stage == 3:
        kept = undivided(group, zero) * zero.weight
        weights, host = (kept, low) if zero.offloads_weights else (kept + low, 0)
        if zero.offloads:
            return Resident(weights, 0, 0, host + states + masters)
        return Resident(weights, part * zero.accumulated, states, host)
    weights = low * zero.data
    if zero.offloads:  # the host also holds gradients on their way down and weights on their way up
        return Resident(weights, 0, 0, states + masters + low)
    return Resident(weights, masters * zero.data if zero.keeps_fp32_gradients else 0, states, 0)


class GradientBytes(NamedTuple):
    """Bytes that gradients take in a step beside what is held between steps.

    accumulated: after a backward pass. bucket: buffers that gradients pass, made when the first one comes. copy: of a
    full bucket, to reduce it. reducing: after the last backward pass, beside both. update: in the optimizer's step.
    """

    accumulated: int
    bucket: int
    copy: int
    reducing: int
    update: int


def gradient_bytes(groups: Mapping[str, Group], zero: ZeroSettings) -> GradientBytes:
    """groups: those whose parameters get gradients."""
    elements = sum(map(_elements, groups.values()))
    part = sum(partition(group, zero) for group in groups.values())
    largest = max(max(group) for group in groups.values())
    if zero.keeps_fp32_gradients:  # bf16 gradients stay to the step; the fp32 ones are reduced in copies
        copied = elements * FP32 if elements <= _BF16_BUCKET else 0
        cast = min(elements, _BF16_BUCKET) * zero.reduced if zero.reduced != FP32 else 0
        kept = elements * zero.weight
        return GradientBytes(kept, 0, copied + cast, kept, kept)
    full = min(max(zero.bucket, largest), elements)
    if zero.stage == 3:
        return GradientBytes(0, 0, full * zero.reduced, 0, 0 if zero.offloads else min(part, zero.sub_group) * FP32)
    widens = zero.weight != zero.accumulated
    element = zero.accumulated if zero.stage == 1 else zero.weight
    bucket = zero.bucket * element * (2 if zero.overlaps else 1) if zero.contiguous else 0
    copied = element if zero.data > 1 or widens else 0
    copy = full * (copied + (zero.reduced if zero.reduced != zero.weight else 0))
    # in bf16 the partition's own elements, summed in fp32; in fp32 all of each parameter that it has a part of
    kept = part * FP32 if widens else 0 if zero.offloads else min(elements, part + largest) * FP32
    update = kept if widens or zero.offloads else kept + part * FP32
    if zero.stage == 2:
        return GradientBytes(kept, bucket, copy, kept, update)
    waiting = elements * element  # ZeRO-1 keeps all until the last micro-batch
    return GradientBytes(waiting, bucket, copy, waiting + kept - (full * element if bucket else 0), update)


def _elements(group: Group) -> int:
    return sum(numel * count for numel, count in group.items())
