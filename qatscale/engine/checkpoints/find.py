"""Checkpoints as people name them: a folder, a run, or RUN@STEP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qatscale.config import is_unaltered, load_run_config
from qatscale.config.schema import RunConfig
from qatscale.engine.checkpoints.files import (
    MANIFEST,
    STEP,
    CheckpointReader,
    advice,
    list_checkpoints,
    newest_checkpoint,
    verify_files,
)
from qatscale.errors import UserError


def open_checkpoint(what: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, CheckpointReader]:
    """A checkpoint, named as `find_checkpoint` takes it, and its run's configuration with `overrides`.

    UserError where it is damaged, or where the run's recipe is missing or was altered since the save.
    """
    folder = find_checkpoint(what)
    recipe = folder.resolve().parent.parent / "recipe.yaml"
    if not recipe.is_file():
        raise UserError("checkpoint", what, f"its run's recipe is not beside it ({recipe}).")
    reader = CheckpointReader(folder)
    if not is_unaltered(recipe, reader.manifest.recipe_hash):
        problem = f"{recipe} was altered after the checkpoint was saved: it describes another model or run."
        raise UserError("checkpoint", what, problem, "Restore the recipe.")
    verify_files(folder, reader.manifest)
    return load_run_config(recipe, overrides), reader


def find_checkpoint(what: str | Path) -> Path:
    """A checkpoint from how people name one: its folder, a run folder (its newest), or `RUN@STEP`.

    UserError where none exists, with those that do.
    """
    path, at = Path(what), ""
    if not path.exists() and "@" in str(what):  # where a path holds one, the last is meant
        text, _, at = str(what).rpartition("@")
        path = Path(text)
    if not at and STEP.match(path.resolve().name):
        if not (path / MANIFEST).is_file():
            raise UserError("checkpoint", str(path), "no complete checkpoint here.", advice(path))
        return path
    found = list_checkpoints(path / "checkpoints")
    newest = None if at else newest_checkpoint(path / "checkpoints")
    if not found:
        none = "no run folder with a complete checkpoint, and no checkpoint folder."
        raise UserError("checkpoint", str(what), none, _what_is_there(path))
    if newest:
        return newest
    steps = {int(p.name.removeprefix("step-")): p for p in found}
    if not at.isdigit() or int(at) not in steps:
        problem = f"no checkpoint at step {at}; there are: {', '.join(map(str, steps))}."
        raise UserError("checkpoint", str(what), problem)
    return steps[int(at)]


def _what_is_there(path: Path) -> str:
    """Where no checkpoint is."""
    if not path.is_dir():
        return "The folder does not exist."
    if (path / "run.json").is_file():
        return "The run has none yet."
    if (path / "config.json").is_file():
        convert = f"qatscale convert {path} --to checkpoint --out runs/NAME --recipe RECIPE"
        return f"It looks like a Hugging Face model; make it a run to branch from: {convert}"
    runs = sorted(str(file.parent) for file in path.glob("*/run.json"))
    return f"It holds runs; give one: {', '.join(runs[:5])}." if runs else "It holds no run.json."
