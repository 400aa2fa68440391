"""From a prepared model to a DeepSpeed engine: optimizer groups, AdamW, ZeRO."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qatscale.config.ds_config import merge_ds_config
from qatscale.config.schema import RunConfig
from qatscale.engine.fragments import ZeroMasters
from qatscale.engine.runtime import Runtime
from qatscale.quant.plugin import scale_groups
from qatscale.quant.quantizers import get_quantizer
from qatscale.timeline.timeline import StepSettings


def optimizer_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices (decayed), norms (not decayed), and one per bit width of scales (not decayed).

    `lr_ratio` is the group's rate over the schedule's. A scale of a b-bit quantizer is about 1/Qp of the row's largest
    weight, and Adam moves every parameter by about the rate, so its rate is 1/Qp of theirs unless the recipe says else.
    """
    scales = scale_groups(model)
    of_scales = {id(p) for group in scales.values() for p in group}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in of_scales]
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": [p for p in weights if p.ndim >= 2], "lr_ratio": 1.0, "decayed": True},
        {"name": "norms", "params": [p for p in weights if p.ndim < 2], "lr_ratio": 1.0, "decayed": False},
    ]
    for bits, parameters in scales.items():
        ratio = config.qat.scale_lr_ratio
        ratio = 1 / max(1, get_quantizer(bits).qp) if ratio == "auto" else ratio
        groups.append({"name": f"scales_{bits:g}bit", "params": parameters, "lr_ratio": ratio, "decayed": False})
    return [group for group in groups if group["params"]]


def initialize_engine(model: nn.Module, config: RunConfig, ds_config: dict, runtime: Runtime) -> tuple[Any, ZeroMasters]:
    """The DeepSpeed engine and the way to its masters. `ds_config` is what `load_ds_config` gave, not yet merged."""
    import deepspeed

    groups = optimizer_groups(model, config)
    adam = torch.optim.AdamW(
        groups,
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adam, config=merge_ds_config(config, ds_config, runtime.ranks), dist_init_required=False
    )
    masters = ZeroMasters(engine)
    assert all(masters.steps_taken(p) == 0 for p in masters.by_partition()), "the optimizer stepped before training"
    return engine, masters


def apply_settings(engine: Any, settings: StepSettings) -> None:
    """Give AdamW the rate, betas and weight decay of the step about to be taken."""
    for group in engine.optimizer.param_groups:
        group["lr"] = settings.learning_rate * group["lr_ratio"]
        group["betas"] = settings.betas
        group["weight_decay"] = settings.weight_decay if group["decayed"] else 0.0
