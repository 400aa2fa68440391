"""Whether a run keeps quantized weights for all micro-batches of a step, and what that costs. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qatscale.config import precision_of
from qatscale.config.schema import RunConfig
from qatscale.engine.estimate.local_sizes import LocalSizes, local_sizes
from qatscale.engine.layout import Layout, stages_of


def keeps_weights(config: RunConfig, ds_config: Mapping[str, Any], layout: Layout) -> bool:
    """`auto`: where more than one micro-batch uses them and it costs no memory at the fullest moment of a step.

    Without activation checkpointing autograd keeps every quantized weight from forward to backward, so that when
    backward begins all of them are there anyway. ZeRO-3 has no weights between the layers' own calls.
    """
    setting = config.engine.quantized_weight_cache
    if config.qat.scheme == "fp" or ds_config["zero_optimization"]["stage"] == 3:
        return False
    if setting == "auto":
        return micro_batches(config, layout) > 1 and not config.engine.activation_checkpointing
    return setting == "on"


def micro_batches(config: RunConfig, layout: Layout) -> int:
    """Of a step, on one process."""
    return config.batch.sequences // (config.batch.micro_batch * layout.data)


def kept_bytes(share: LocalSizes, element: int) -> int:
    """Of the quantized Linear weights of a process, `element` bytes each. The embedding quantizes what it looks up."""
    matrices = [*share.block] * share.blocks + ([share.head] if share.head else [])
    return element * sum(matrix.numel for matrix in matrices if matrix.bits is not None)


def weight_cache_notices(config: RunConfig, ds_config: Mapping[str, Any], layout: Layout) -> tuple[str, ...]:
    """What a person should know of it before the run."""
    count = micro_batches(config, layout)
    if not keeps_weights(config, ds_config, layout):
        return ()
    if count == 1 and not config.engine.activation_checkpointing:
        return ("engine.quantized_weight_cache=on has no effect: a step has one micro-batch, and recomputes nothing",)
    element = {"fp32": 4, "bf16": 2}[precision_of(ds_config)]
    size = max(kept_bytes(local_sizes(config, layout, stage), element) for stage in stages_of(config))
    adds = ", which autograd would keep as well" if not config.engine.activation_checkpointing else ""
    several = "es" if count > 1 else ""
    return (
        f"in QAT each weight is quantized once a step, for its {count} micro-batch{several}, and kept: "
        f"{size / 1e6:,.1f} MB a process{adds}",
    )
