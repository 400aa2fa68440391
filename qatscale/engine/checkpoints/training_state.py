"""The state of a training run without its layout, read one tensor at a time: what every conversion passes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatscale.config.ds_config import precision_of, run_ds_config
from qatscale.config.recipe import recipe_hash
from qatscale.config.schema import RunConfig
from qatscale.engine.checkpoints.files import KINDS, commit, slice_name, writing_folder
from qatscale.engine.checkpoints.manifest import Manifest, ParameterRecord
from qatscale.engine.checkpoints.reader import CheckpointReader, open_checkpoint
from qatscale.model.llama import Llama
from qatscale.quant.plugin import QatPlugin
from qatscale.schedule.build import build_timeline
from qatscale.tensor_files import SHARD_BYTES, Shape, write_safetensors

UNKNOWN_DATA = ""
"""The fingerprint of unknown tokens."""


class Skeleton:
    """What a recipe's prepared model consists of, without its numbers and their memory.

    UserError where the recipe's timeline or quantization cannot be.
    """

    def __init__(self, config: RunConfig) -> None:
        with torch.device("meta"):
            model, plugin = _prepared(config)
        names = {p: name for name, p in model.named_parameters()}
        self.shapes: dict[str, Shape] = {name: tuple(p.shape) for p, name in names.items()}
        """Every parameter's, in the model's order; tied ones once, scales included."""
        self.groups = [{**group, "params": [names[p] for p in group["params"]]} for group in plugin.optimizer_groups()]
        """`QatPlugin.optimizer_groups`, in which "params" holds names."""
        self.plugin = plugin.state()
        """The plugin's state before the switch."""
        self.scales = [name for name in self.shapes if name.endswith(".weight_scale")]


def _prepared(config: RunConfig) -> tuple[Llama, QatPlugin]:
    model = Llama(config.model)
    plugin = QatPlugin(config.qat, build_timeline(config).switch_step)
    plugin.prepare(model)
    return model, plugin


@dataclass(frozen=True)
class TrainingState:
    """The state of a run, in whatever format it is stored."""

    config: RunConfig
    source: str
    """What it was read from, for people."""
    step: int
    """Optimizer steps done."""
    data: str
    """Fingerprint of the tokens it was trained on, or UNKNOWN_DATA."""
    plugin: dict[str, Any]
    shapes: Mapping[str, Shape]
    adam_steps: Mapping[str, int]
    """Parameter -> Adam's own count; 0 = its moments are zero."""
    read: Callable[[str, str], Tensor]
    """(kind, parameter) -> all of it, fp32, in its shape. Moments are asked for only where Adam's count is above 0."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer of its tokens; None where it is not known."""
    notes: tuple[str, ...] = ()
    """What a person should know of what is not in the source."""


def read_checkpoint(what: str) -> TrainingState:
    """A checkpoint of ours: RUN, RUN@STEP or its folder. UserError where it is damaged or its recipe not beside it."""
    config, reader = open_checkpoint(what)
    parameters = reader.manifest.parameters
    return TrainingState(
        config=config, source=str(reader.folder), step=reader.manifest.step, data=reader.manifest.data,
        tokenizer=reader.manifest.tokenizer, plugin=reader.manifest.plugin,
        shapes={name: tuple(record.shape) for name, record in parameters.items()},
        adam_steps={name: record.adam_steps for name, record in parameters.items()},
        read=lambda kind, name: reader.parameter(name, kind),
    )  # fmt: skip


@torch.no_grad()
def load_checkpointed_model(
    reader: CheckpointReader, config: RunConfig, device: torch.device
) -> tuple[Llama, QatPlugin]:
    """The model of a checkpoint of any layout, on one process, in the precision that training's forward used."""
    model, plugin = _prepared(config)
    model.load_state_dict(reader.weights(), strict=False)  # tied weights are stored once; names were checked on saving
    plugin.load_state(reader.manifest.plugin)
    if precision_of(run_ds_config(config)) == "bf16":
        model.to(torch.bfloat16)  # scales and weights as the forward pass saw them
    return model.to(device), plugin


def write_state(state: TrainingState, checkpoints: Path, config: RunConfig) -> Path:
    """Write a checkpoint of `state` that belongs to the run of `config`; returns its folder."""
    from huggingface_hub import split_torch_state_dict_into_shards

    writing = writing_folder(checkpoints, state.step)
    writing.mkdir(parents=True)
    slices = {
        slice_name(kind, name, 0, None): (kind, name)
        for name in state.shapes
        for kind in (KINDS if state.adam_steps[name] else KINDS[:1])
    }
    flat = {key: torch.empty(state.shapes[name], device="meta").flatten() for key, (_, name) in slices.items()}
    shards = split_torch_state_dict_into_shards(flat, max_shard_size=SHARD_BYTES).filename_to_tensors.values()
    files: dict[str, Any] = {}
    for index, keys in enumerate(shards):
        path = writing / f"shard-{index:05d}-of-{len(shards):05d}.safetensors"
        shapes = {key: tuple(flat[key].shape) for key in keys}
        sha256 = write_safetensors(path, shapes, torch.float32, lambda key: state.read(*slices[key]).flatten())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
    manifest = Manifest(
        step=state.step,
        tokens=state.step * config.tokens_per_step,
        reason="imported",
        kept=True,
        recipe_hash=recipe_hash(checkpoints.parent / "recipe.yaml"),
        data=state.data,
        tokenizer=state.tokenizer,
        plugin=state.plugin,
        parameters={n: ParameterRecord(list(state.shapes[n]), state.adam_steps[n]) for n in sorted(state.shapes)},
        layout={},
        files=files,
    )
    return commit(checkpoints, manifest)
