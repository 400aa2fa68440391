"""The model of a checkpoint on one process, to evaluate, export or generate with."""

from __future__ import annotations

from pathlib import Path

import torch

from qatscale.config.ds_config import precision_of, run_ds_config
from qatscale.config.schema import RunConfig
from qatscale.engine.checkpoints.files import CheckpointReader, verify_files
from qatscale.model.llama import Llama
from qatscale.quant.plugin import QatPlugin
from qatscale.schedule.build import build_timeline


@torch.no_grad()
def load_checkpointed_model(checkpoint: Path, config: RunConfig, device: torch.device) -> tuple[Llama, QatPlugin]:
    """The model of a checkpoint of any layout, on one process, in the precision that training's forward used."""
    reader = CheckpointReader(checkpoint)
    verify_files(checkpoint, reader.manifest)
    model = Llama(config.model)
    timeline = build_timeline(config)
    plugin = QatPlugin(config.qat, timeline.switch_step)
    plugin.prepare(model)
    model.load_state_dict(reader.weights(), strict=False)  # tied weights are stored once; names were checked on saving
    plugin.load_state(reader.manifest.plugin)
    if precision_of(run_ds_config(config)) == "bf16":
        model.to(torch.bfloat16)  # scales and weights as the forward pass saw them
    return model.to(device), plugin
