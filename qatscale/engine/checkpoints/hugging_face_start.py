"""A Hugging Face folder as the start of a run: weights and shape are the folder's, the schedule is a recipe's.

Such a folder has no optimizer state: Adam begins anew, with moments of zero and a step count of 0, and re-estimates
them in its first steps. Quantizer scales exist and are inert, as in any run before its switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qatscale.config.recipe import load_run_config
from qatscale.config.schema import ModelConfig, RunConfig
from qatscale.config.yaml_text import value_text
from qatscale.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer, load_tokenizer, tokenizer_folder
from qatscale.engine.checkpoints.training_state import UNKNOWN_DATA, Skeleton, TrainingState
from qatscale.errors import UserError
from qatscale.model.hugging_face import (
    attention_window,
    hugging_face_names,
    open_hugging_face,
    read_config,
    trained_length,
)
from qatscale.model.hugging_face_tokenizer import PROBES
from qatscale.schedule.build import build_timeline


def read_hugging_face(
    folder: Path, recipe: str | None, overrides: Sequence[str] = (), trained_tokens: int = 0
) -> TrainingState:
    """The state of a run of this recipe after `trained_tokens`, with these weights.

    UserError for a model that `Llama` cannot compute exactly, data of another tokenizer, and a damaged folder. A weight
    that is not finite is a UserError when it is read.
    """
    model = read_config(folder)
    if recipe is None:
        problem = "is needed: a Hugging Face folder does not describe data, batch, optimizer and schedule."
        raise UserError("--recipe", None, problem, "Name one (`qatscale recipes`) or the path of a YAML file.")
    config, misfits = _without_misfits(_with_shape(model, folder, recipe, overrides))
    length, positions, window = config.data.sequence_length, trained_length(folder), attention_window(folder)
    if window is not None and length > window:
        problem = f"the model's attention looks back over {window} positions only (sliding_window), ours over all."
        raise UserError("data.sequence_length", length, problem, f"Set data.sequence_length={window} or less.")
    _, state = open_hugging_face(folder)
    bones, theirs = Skeleton(config), hugging_face_names(config.model)

    def read(kind: str, name: str) -> Tensor:
        assert kind == "weight", "Adam's moments are not in a Hugging Face folder"
        if name in scales:
            return torch.ones(bones.shapes[name])
        value = state[name].float()
        if not torch.isfinite(value).all():
            raise UserError("weights", str(folder), f"{theirs[name]} holds NaN or infinity.", "Save the model anew.")
        return value

    scales = set(bones.scales)
    notes = [
        *misfits,
        "Adam starts anew, with moments of zero and step count 0: the folder has none, and the first steps re-estimate "
        "them. A warm-up is advisable.",
    ]
    if positions is not None and length > positions:
        notes.append(
            f"data.sequence_length = {length} is longer than the {positions} positions that the model was trained on"
        )
    if window is not None:
        notes.append(f"the model attends to a window of {window} positions; exports of this run attend to all")
    return TrainingState(
        config=config, source=str(folder), step=round(trained_tokens / config.tokens_per_step), data=UNKNOWN_DATA,
        plugin=bones.plugin, shapes=bones.shapes, adam_steps=dict.fromkeys(bones.shapes, 0), read=read,
        tokenizer=_tokenizer(folder, config), notes=tuple(notes),
    )  # fmt: skip


def _with_shape(model: ModelConfig, folder: Path, recipe: str, overrides: Sequence[str]) -> RunConfig:
    """The recipe in full precision with the folder's shape in place of its own.

    Whatever scheme the recipe has is that of the branches: what they start from has not been quantized.
    """
    for override in overrides:
        key, _, value = override.removeprefix("--").partition("=")
        if key.startswith("model."):
            fix = "Leave it out: the shape of the model is the folder's."
            raise UserError(key, value, f"{folder}/config.json decides it.", fix)
    shape = [f"model.{key}={value_text(value)}" for key, value in model.model_dump().items()]
    config = load_run_config(recipe, [*shape, "qat.scheme=fp", *overrides])
    if config.qat.scheme != "fp":
        problem = "the weights of the folder are in full precision."
        raise UserError("qat.scheme", config.qat.scheme, problem, "Leave it out here, and set it in the branches.")
    return config


def _without_misfits(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The folder trains nothing, so lengths that do not fit are no error here; and a note about them."""
    try:
        build_timeline(config)
    except UserError as misfit:
        lengths = [f"{part}_{unit}" for part in ("warmup", "cooldown") for unit in ("fraction", "tokens")]
        fitted = {
            "tokens": max(config.tokens, config.tokens_per_step),
            "schedule": config.schedule.model_copy(update=dict.fromkeys(lengths)),
            "checkpoint": config.checkpoint.model_copy(update={"keep_at": []}),
        }
        note = f"a branch needs tokens= and lengths of its own, since the recipe's do not fit: {misfit}"
        return config.model_copy(update=fitted), [note]
    return config, []


def _tokenizer(folder: Path, config: RunConfig) -> str | None:
    """The fingerprint of the model's tokenizer, to compare with that of the data that the model will meet.

    Where the recipe names data, theirs, if both give the same ids to the same texts: they may end documents with other
    tokens. UserError where they do not.
    """
    data = config.data.folder
    own, names_end = _load(folder)
    prepared = tokenizer_folder(data) if data and data.is_dir() else None
    if prepared is None:
        return own.fingerprint if own and names_end else None
    used = load_tokenizer(prepared)
    if own is not None:
        ours, theirs = ([ids.tolist() for ids in one.encode_batch(list(PROBES))] for one in (used, own))
        if ours != theirs:
            problem = "was prepared with another tokenizer than the model's: the same ids mean other text."
            raise UserError("data.path", str(data), problem, f"Prepare the text with --tokenizer {folder}.")
    return used.fingerprint


def _load(folder: Path) -> tuple[Tokenizer | None, bool]:
    """The model's tokenizer, None where the folder holds none that is read; and whether it names an end of text."""
    if not any((folder / name).is_file() for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE)):
        return None, False
    for eos in (None, "0"):  # any end will do to compare the ids of texts
        try:
            return load_tokenizer(folder, eos), eos is None
        except UserError:
            continue
    return None, False
