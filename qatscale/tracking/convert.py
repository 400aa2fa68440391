"""Conversion between training checkpoints, DeepSpeed's universal layout and Hugging Face folders.

One parameter is in memory at a time, and the output appears complete or not at all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from qatlaw.text import listed
from qatscale.config.recipe import recorded_yaml
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters
from qatscale.data.tokenizer import tokenizer_folder
from qatscale.engine.checkpoints.folders import MANIFEST
from qatscale.engine.checkpoints.hugging_face_start import read_hugging_face
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.engine.checkpoints.training_state import TrainingState, read_checkpoint, write_state
from qatscale.engine.checkpoints.universal import find_universal, read_universal, write_universal
from qatscale.errors import UserError, did_you_mean
from qatscale.model.hugging_face import export_hugging_face
from qatscale.model.lazy_state import LazyState
from qatscale.new_folder import appearing, check_new
from qatscale.schedule.build import build_timeline
from qatscale.tracking.new_run import create_run_folder

Format = Literal["checkpoint", "universal", "hf"]
_SHOWN: dict[Format, str] = {
    "checkpoint": "a training checkpoint",
    "universal": "a universal checkpoint",
    "hf": "a Hugging Face folder",
}


def convert(
    source: str,
    to: str,
    out: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    trained_tokens: int | None = None,
) -> TrainingState:
    """Read `source` in any of the formats, write it in format `to` as the new folder `out`, and return what was read.

    recipe, overrides: those of the new run for a Hugging Face or universal folder; a checkpoint has its own.
    trained_tokens: tokens that a Hugging Face model has seen; None = count from 0.
    UserError where the source has another format, is damaged, or differs from the recipe's model, and where `out` is
    not empty.
    """
    if to not in get_args(Format):
        raise UserError("--to", to, "is not a layout.", did_you_mean(to, get_args(Format)))
    found = format_of(source)
    if found == to:
        raise UserError("--to", to, f"{source} is {_SHOWN[found]} already.")
    _refuse_unused(found, recipe, overrides, trained_tokens)
    check_new(out)
    if found == "checkpoint":
        state = read_checkpoint(source)
    elif found == "universal":
        folder = find_universal(Path(source))
        assert folder is not None
        state = read_universal(folder, recipe, overrides)
    else:
        state = read_hugging_face(Path(source), recipe, overrides, trained_tokens or 0)
    {"checkpoint": write_run, "universal": write_universal, "hf": write_hugging_face}[to](state, out)
    return state


def format_of(source: str) -> Format:
    """Recognised by its files. UserError for any other source."""
    path = Path(source)
    if find_universal(path) is not None:
        return "universal"
    if list(path.glob("*_optim_states.pt")) or (path / "latest").is_file():
        command = "python -m deepspeed.checkpoint.ds_to_universal --input_folder … --output_folder …"
        problem = "is a DeepSpeed checkpoint, which fits one layout only."
        raise UserError("source", source, problem, f"Make it universal first: {command}")
    is_run = (path / "run.json").is_file() or (path / MANIFEST).is_file()
    if not is_run and ((path / "config.json").is_file() or list(path.glob("*.safetensors*"))):
        return "hf"
    if path.is_dir() and not is_run and not (path / "checkpoints").is_dir():
        names = sorted(item.name for item in path.iterdir())
        held = listed(names) or "nothing"
        fix = "Give a run (RUN or RUN@STEP), a checkpoint's folder, a universal checkpoint, or a Hugging Face folder."
        raise UserError("source", source, f"cannot be converted: it holds {held}.", fix)
    find_checkpoint(source)
    return "checkpoint"


def _refuse_unused(found: Format, recipe: str | None, overrides: Sequence[str], trained_tokens: int | None) -> None:
    """UserError for options without effect, and for keys that the new folder decides."""
    if found == "checkpoint" and (recipe is not None or overrides):
        fix = "Leave it out; keys are set when you branch."
        raise UserError("--recipe", recipe or " ".join(overrides), "a checkpoint's run has its own recipe.", fix)
    if found != "hf" and trained_tokens is not None:
        raise UserError("--trained-tokens", trained_tokens, f"{_SHOWN[found]} knows its own step.", "Leave it out.")
    for override in overrides:
        key, _, value = override.removeprefix("--").partition("=")
        if key in ("name", "output"):
            raise UserError(key, value, "the run is named by its folder, --out.", "Leave it out.")


def write_run(state: TrainingState, out: Path) -> None:
    """A run's folder with one checkpoint, to branch from. It is marked as imported and named by its folder."""
    try:
        config = RunConfig.model_validate(
            {**state.config.model_dump(mode="json"), "name": out.name, "output": out.parent}
        )
    except ValueError:
        problem = "is the run's name too, which holds letters, digits and . _ = + -, and begins with a letter or digit."
        raise UserError("--out", str(out), problem) from None
    with appearing(out) as path:
        folder = create_run_folder(
            path,
            recipe=recorded_yaml(config),
            ds_config={},  # there was no engine
            timeline=build_timeline(config),
            n_params=count_parameters(config.model),
            command=sys.argv,
            imported=str(Path(state.source).resolve()) if Path(state.source).exists() else state.source,
        )
        written = write_state(state, folder.checkpoints, config)
        shown = out / folder.checkpoints.name / written.name
        folder.append("checkpoint", step=state.step, path=str(shown), reason="imported", kept=True)
        folder.close()


def write_hugging_face(state: TrainingState, out: Path) -> None:
    """The weights in full precision, with the tokenizer of the run's data if it exists."""
    shapes = {name: shape for name, shape in state.shapes.items() if not name.endswith(".weight_scale")}
    export_hugging_face(
        LazyState(shapes, lambda name: state.read("weight", name)),
        state.config.model,
        out,
        sequence_length=state.config.data.sequence_length,
        tokenizer_folder=tokenizer_folder(state.config.data.folder, state.tokenizer),
    )
