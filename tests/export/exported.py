"""Training's model as the tests see it, independent of the export: loaded as `qatscale evaluate` loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qatscale.config.recipe import load_run_config
from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.export.formats.base import get_format
from qatscale.model.hugging_face import hugging_face_names
from qatscale.model.llama import Llama
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.selection import fake_quant_modules


def need(format: str) -> None:
    """Skip where the format's client is not installed: the extra `clients`."""
    if missing := get_format(format).clients[0].missing():
        pytest.skip(f"{', '.join(missing)} not installed")


def trained(run: Path) -> Llama:
    """In the precision that training's forward used, computing in the quantized view."""
    config = load_run_config(run / "recipe.yaml")
    model, _ = load_checkpointed_model(CheckpointReader(find_checkpoint(run)), config, torch.device("cpu"))
    return model.eval()


def trained_weights(run: Path) -> dict[str, Tensor]:
    """Hugging Face's name -> the weights of training's forward pass, by its own layers."""
    model = trained(run)
    names = hugging_face_names(model.config)
    values = {name: value.detach() for name, value in model.named_parameters() if not name.endswith("_scale")}
    for name, layer in fake_quant_modules(model):
        if f"{name}.weight" in values:
            values[f"{name}.weight"] = fake_quantize(layer.quantizer, layer.weight, layer.weight_scale).detach()
    return {names[name]: value for name, value in values.items()}


def plain_model(run: Path) -> Llama:
    """fp32 arithmetic on these weights."""
    config = load_run_config(run / "recipe.yaml").model
    model = Llama(config)
    values = trained_weights(run)
    state = {ours: values[theirs].float() for ours, theirs in hugging_face_names(config).items()}
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    return model.eval()


def snippets(folder: Path) -> list[str]:
    """The Python code of a model card, block by block."""
    text = (folder / "README.md").read_text()
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


def described(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())
