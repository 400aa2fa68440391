"""A Hugging Face Llama folder as the start of a run: its weights, and all else from a recipe.

Such a folder has no optimizer state: Adam begins anew, with moments of zero and a step count of 0, and re-estimates
them in its first steps. Quantizer scales are there and inert, as in any run before its switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qatscale.config import load_run_config
from qatscale.config.amounts import format_amount
from qatscale.config.recipe import read_recipe
from qatscale.config.schema import ModelConfig, RunConfig
from qatscale.engine.checkpoints.training_state import UNKNOWN_DATA, TrainingState, skeleton
from qatscale.errors import UserError, UserErrors
from qatscale.model.hugging_face import open_hugging_face, read_config, trained_length

FRESH = "init_std"
"""The one key of a model that says nothing of a trained one."""


def read_hugging_face(
    folder: Path, recipe: str | None, overrides: Sequence[str] = (), trained_tokens: int = 0
) -> TrainingState:
    """The state of a run of this recipe that stands at `trained_tokens` and has these weights.

    UserError for a model that `Llama` cannot compute exactly, a recipe of another model, and a damaged folder.
    """
    model = read_config(folder)
    if recipe is None:
        allowed = "is needed: a Hugging Face folder says nothing of data, batch, optimizer and schedule."
        raise UserError("--recipe", None, allowed, "Name one (`qatscale recipes`) or the path of a YAML file.")
    config = _fitting_recipe(model, folder, recipe, overrides)
    step = round(trained_tokens / config.tokens_per_step)
    if step >= config.steps:
        allowed = f"the model has seen {format_amount(trained_tokens)} already (--trained-tokens)."
        raise UserError("tokens", config.tokens, allowed, "Set tokens to what a branch is to reach in all.")
    _, state = open_hugging_face(folder)
    bones = skeleton(config)

    def read(kind: str, name: str) -> Tensor:
        assert kind == "weight", "Adam's moments are not in a Hugging Face folder"
        return torch.ones(bones.shapes[name]) if name in scales else state[name].float()

    scales = set(bones.scales)
    return TrainingState(
        config=config,
        source=str(folder),
        step=step,
        data=UNKNOWN_DATA,
        plugin=bones.plugin,
        shapes=bones.shapes,
        adam_steps=dict.fromkeys(bones.shapes, 0),
        read=read,
        notes=_notes(folder, config),
    )


def _notes(folder: Path, config: RunConfig) -> tuple[str, ...]:
    notes = [
        "Adam starts anew, with moments of zero and step count 0: the folder has none, and the first steps re-estimate "
        "them. A warm-up is advisable."
    ]
    length = trained_length(folder)
    if length is not None and config.data.sequence_length > length:
        notes.append(
            f"data.sequence_length = {config.data.sequence_length} is longer than the {length} positions that the "
            "model was trained on"
        )
    return tuple(notes)


def _fitting_recipe(model: ModelConfig, folder: Path, recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The recipe in full precision, its model filled from the folder where it says nothing. UserError where it differs.

    Whatever scheme the recipe has is that of the branches: what they start from has not been quantized.
    """
    said = read_recipe(recipe).get("model") or {}
    filled = [f"model.{key}={_yaml(value)}" for key, value in model.model_dump().items() if key not in said]
    config = load_run_config(recipe, [*filled, "qat.scheme=fp", *overrides])
    if config.qat.scheme != "fp":
        allowed = "the weights of the folder are in full precision."
        raise UserError("qat.scheme", config.qat.scheme, allowed, "Leave it out; it is for the branches to say.")
    problems = [
        UserError(f"model.{key}", ours, f"{folder}/config.json says {theirs!r}.", f"Add model.{key}={_yaml(theirs)}.")
        for key, ours, theirs in _differences(config.model, model)
    ]
    if problems:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)
    return config


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, object, object]]:
    """(key, our value, their value) of every key that matters to a trained model."""
    one, other = ({**m.model_dump(), "kv_heads": m.kv_heads or m.heads} for m in (ours, theirs))
    return [(key, one[key], other[key]) for key in one if key != FRESH and one[key] != other[key]]


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
