"""A Hugging Face Llama folder as the start of a run: its weights, and all else from a recipe.

Such a folder has no optimizer state: Adam begins anew, with moments of zero and a step count of 0, and re-estimates
them in its first steps. Quantizer scales exist and are inert, as in any run before its switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qatscale.config import load_run_config
from qatscale.config.amounts import format_amount
from qatscale.config.problems import together
from qatscale.config.recipe import read_recipe
from qatscale.config.schema import ModelConfig, RunConfig
from qatscale.engine.checkpoints.training_state import UNKNOWN_DATA, TrainingState, skeleton
from qatscale.errors import UserError
from qatscale.model.hugging_face import open_hugging_face, read_config, trained_length


def read_hugging_face(
    folder: Path, recipe: str | None, overrides: Sequence[str] = (), trained_tokens: int = 0
) -> TrainingState:
    """The state of a run of this recipe after `trained_tokens`, with these weights.

    UserError for a model that `Llama` cannot compute exactly, a recipe of another model, and a damaged folder.
    """
    model = read_config(folder)
    if recipe is None:
        problem = "is needed: a Hugging Face folder does not describe data, batch, optimizer and schedule."
        raise UserError("--recipe", None, problem, "Name one (`qatscale recipes`) or the path of a YAML file.")
    config = _fitting_recipe(model, folder, recipe, overrides)
    step = round(trained_tokens / config.tokens_per_step)
    if step >= config.steps:
        problem = f"the model has seen {format_amount(trained_tokens)} already (--trained-tokens)."
        raise UserError("tokens", config.tokens, problem, "Set tokens to what a branch is to reach in all.")
    _, state = open_hugging_face(folder)
    bones = skeleton(config)

    def read(kind: str, name: str) -> Tensor:
        assert kind == "weight", "Adam's moments are not in a Hugging Face folder"
        return torch.ones(bones.shapes[name]) if name in scales else state[name].float()

    scales = set(bones.scales)
    notes = [
        "Adam starts anew, with moments of zero and step count 0: the folder has none, and the first steps re-estimate "
        "them. A warm-up is advisable."
    ]
    length, positions = config.data.sequence_length, trained_length(folder)
    if positions is not None and length > positions:
        notes.append(
            f"data.sequence_length = {length} is longer than the {positions} positions that the model was trained on"
        )
    return TrainingState(
        config=config,
        source=str(folder),
        step=step,
        data=UNKNOWN_DATA,
        plugin=bones.plugin,
        shapes=bones.shapes,
        adam_steps=dict.fromkeys(bones.shapes, 0),
        read=read,
        notes=tuple(notes),
    )


def _fitting_recipe(model: ModelConfig, folder: Path, recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The recipe in full precision, its model completed from the folder. UserError where the two differ.

    Whatever scheme the recipe has is that of the branches: what they start from has not been quantized.
    """
    said = read_recipe(recipe).get("model") or {}
    filled = [f"model.{key}={_yaml(value)}" for key, value in model.model_dump().items() if key not in said]
    config = load_run_config(recipe, [*filled, "qat.scheme=fp", *overrides])
    if config.qat.scheme != "fp":
        problem = "the weights of the folder are in full precision."
        raise UserError("qat.scheme", config.qat.scheme, problem, "Leave it out here, and set it in the branches.")
    ours, theirs = ({**m.model_dump(), "kv_heads": m.kv_heads or m.heads} for m in (config.model, model))
    del ours["init_std"]  # the one key that does not matter to a trained model
    problems = [
        UserError(
            f"model.{key}",
            value,
            f"{folder}/config.json says {theirs[key]!r}.",
            f"Add model.{key}={_yaml(theirs[key])}.",
        )
        for key, value in ours.items()
        if value != theirs[key]
    ]
    if problems:
        raise together(problems)
    return config


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
