"""`qatscale train`, `resume` and `branch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatlaw.amounts import parse_amount
from qatscale.cli import completion
from qatscale.cli.terminal import Json, Overrides, as_overrides, console, refuse, run_argument, say
from qatscale.errors import UserError, exit_code

if TYPE_CHECKING:
    from qatscale.config.schema import RunConfig

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the timeline, memory, traffic and speed of the run; train nothing.")
]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Train the run even if another process may still do so; that one ends.")
]


def _dry(text: str, **settings: Any) -> Any:
    """An option without effect on training."""
    return typer.Option(help=f"With --dry-run{text}", **settings)


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe by name (`qatscale recipes`) or the path of a YAML file.",
            autocompletion=completion.recipe_or_file,
        ),
    ],
    overrides: Overrides = None,
    branch_from: Annotated[
        str | None,
        typer.Option(
            help="Start from another run's checkpoint: RUN, RUN@STEP or a checkpoint folder.",
            autocompletion=completion.run,
        ),
    ] = None,
    dry_run: DryRun = False,
    figure: Annotated[Path | None, _dry(": draw the timeline into this file.")] = None,
    processes: Annotated[int | None, _dry(": GPUs of the job. [default: WORLD_SIZE, or one model's]", min=1)] = None,
    gpu: Annotated[str | None, _dry(": check that the run fits into this GPU: H200.")] = None,
    gpu_memory: Annotated[float | None, _dry(", for a GPU that is not known by name: its memory in GB.")] = None,
    peak_flops: Annotated[
        str | None, _dry(", for a GPU that is not known by name: its bf16 peak in FLOP/s.", metavar="989T")
    ] = None,
    mfu: Annotated[float | None, _dry(": print tokens/s at this share of the GPU's peak: 0.4.")] = None,
    network: Annotated[
        float | None, _dry(": GB/s that a GPU sends (nccl-tests' busbw). [default: 50; 400 in a node]")
    ] = None,
    host_memory: Annotated[
        float | None, _dry(": check that the run fits into this many GB of a node's memory.")
    ] = None,
    take_over: TakeOver = False,
    as_json: Json = False,
) -> None:
    """Train a run, or continue it where it stopped.

    `deepspeed --module qatscale train` and `torchrun -m qatscale train` take the same arguments and train on many
    processes.
    """
    from qatscale.config.recipe import load_run_config

    config = load_run_config(recipe, overrides or ())
    if dry_run:
        from qatscale.cli.dry_run import print_dry_run
        from qatscale.engine.estimate.fits import Given

        peak = None if peak_flops is None else parse_amount("--peak-flops", peak_flops)
        given = Given(gpu, mfu, network, host_memory, gpu_memory, peak)
        print_dry_run(config, branch_from, figure, processes, given, as_json)
        return
    only_dry = {
        "--processes": processes, "--gpu": gpu, "--gpu-memory": gpu_memory, "--peak-flops": peak_flops, "--mfu": mfu,
        "--network": network, "--host-memory": host_memory, "--figure": figure, "--json": as_json,
    }  # fmt: skip
    refuse(only_dry, "has no effect without --dry-run.")
    _train(config, branch_from, take_over)


def resume(
    run: Annotated[Path, run_argument("A run's folder.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
    take_over: TakeOver = False,
) -> None:
    """Continue a stopped run from its newest checkpoint. Overrides may not change the result."""
    from qatscale.config.recipe import load_run_config
    from qatscale.tracking.run_folder import RunFolder

    folder = RunFolder.open(run.resolve())
    where = [f"output={folder.path.parent}", f"name={folder.path.name}"]  # a run may have been moved or renamed
    config = load_run_config(folder.path / "recipe.yaml", [*where, *(overrides or ())])
    if dry_run:
        from qatscale.cli.dry_run import print_dry_run

        print_dry_run(config, resumes=True)
        return
    _train(config, None, take_over)


def branch(
    checkpoint: Annotated[str, run_argument("Where to start: RUN, RUN@STEP or a checkpoint folder.")],
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="name=NAME KEY=VALUE",
            help="What differs from the parent's recipe.",
            callback=as_overrides,
            autocompletion=completion.override,
        ),
    ],
    dry_run: DryRun = False,
    take_over: TakeOver = False,
) -> None:
    """Start a new run from another run's checkpoint: QAT at some bit width, another cooldown, other betas."""
    config = branch_config(checkpoint, overrides)
    if dry_run:
        from qatscale.cli.dry_run import print_dry_run

        print_dry_run(config, checkpoint)
        return
    _train(config, checkpoint, take_over)


def branch_config(checkpoint: str, overrides: Sequence[str]) -> RunConfig:
    """The parent's recipe with `overrides`, which have to name the new run."""
    from qatscale.config.recipe import load_run_config
    from qatscale.engine.checkpoints.reader import find_checkpoint

    run = find_checkpoint(checkpoint).resolve().parent.parent
    if not any(override.startswith("name=") for override in overrides):
        raise UserError("name", None, "a branch is a run of its own and needs a name.", "Add name=NAME.")
    output = [] if any(override.startswith("output=") for override in overrides) else [f"output={run.parent}"]
    return load_run_config(run / "recipe.yaml", [*output, *overrides])


def _train(config: RunConfig, branch_from: str | None, take_over: bool = False) -> None:
    from qatscale.tracking.compare import comparison_table, run_row
    from qatscale.tracking.run_folder import RunFolder
    from qatscale.tracking.store import where_to_look
    from qatscale.train.run import train

    was_done = (config.folder / "done.json").exists()
    outcome = train(config, branch_from, take_over=take_over)
    if outcome.status == "stopped":
        sys.exit(exit_code(outcome.signal))
    if int(os.environ.get("RANK", 0)) == 0:
        if was_done:
            say(f"{config.folder} is done: nothing was left to train")
        console().print(comparison_table([run_row(RunFolder(config.folder))]))
        print(f"run folder: {config.folder}")
        for line in where_to_look([RunFolder(config.folder)]):
            print(line)
