"""Validation losses of a checkpoint, on one process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from qatscale.config import load_run_config
from qatscale.data.reader import open_validation
from qatscale.engine.checkpoints.files import find_checkpoint, recipe_beside
from qatscale.engine.checkpoints.load_model import load_checkpointed_model
from qatscale.engine.runtime import uses_gpu
from qatscale.quant.bit_widths import get_quantizer
from qatscale.train.validation import open_view, ptq_view, summed_loss


def evaluate_checkpoint(
    what: str, ptq_bits: Iterable[float] = (), data: Path | None = None, tokens: int | None = None
) -> tuple[Path, int, dict[str, float]]:
    """Evaluate a checkpoint, named as `find_checkpoint` takes it, on the held-out data of its run or on `data`.

    Returns the checkpoint's folder, the number of predicted tokens, and view → loss: `fp`, `quantized` where it has
    switched, and `ptqB` for each of `ptq_bits`.
    """
    checkpoint = find_checkpoint(what)
    recipe = recipe_beside(checkpoint, what)
    overrides = [f"data.path={data}"] if data else []
    overrides += [f"evaluation.tokens={tokens}"] if tokens is not None else []
    config = load_run_config(recipe, overrides)
    for bits in ptq_bits:
        get_quantizer(bits)  # refuses an unknown bit width before anything is loaded
    reader = open_validation(config)
    device = torch.device("cuda" if uses_gpu() else "cpu")
    model, plugin = load_checkpointed_model(checkpoint, config, device)
    views = ["fp", *(["quantized"] if plugin.switched_at is not None else []), *map(ptq_view, ptq_bits)]
    losses, counted = {}, 0
    for name in views:
        with open_view(model, name):
            total, counted = summed_loss(model, reader, device, 0, 1)
        losses[name] = total / counted
    return checkpoint, counted, losses
