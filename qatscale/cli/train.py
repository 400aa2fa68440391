"""Start a training run from the command line and say how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qatscale.config.schema import RunConfig
from qatscale.errors import UserError


def branch_config(checkpoint: str, overrides: Sequence[str]) -> RunConfig:
    """The parent's recipe with `overrides`, which have to name the new run."""
    from qatscale.config import load_run_config
    from qatscale.engine.checkpoints.files import find_checkpoint

    run = find_checkpoint(checkpoint).resolve().parent.parent
    if not any(override.startswith("name=") for override in overrides):
        raise UserError("name", None, "a branch is a run of its own and needs a name.", "Add name=NAME.")
    output = [] if any(override.startswith("output=") for override in overrides) else [f"output={run.parent}"]
    return load_run_config(run / "recipe.yaml", [*output, *overrides])


def run_training(config: RunConfig, branch_from: str | None) -> str:
    """Train, then show the result. Returns `done` or `stopped`."""
    import os

    from qatscale.train.run import train

    outcome = train(config, branch_from)
    if outcome.status == "done" and int(os.environ.get("RANK", 0)) == 0:
        print_result(config.folder)
    return outcome.status


def print_result(folder: Path) -> None:
    from qatscale.cli.terminal import console
    from qatscale.tracking.compare import comparison_table, run_row
    from qatscale.tracking.run_folder import RunFolder

    console().print(comparison_table([run_row(RunFolder(folder))]))
    print(f"run folder: {folder}")
