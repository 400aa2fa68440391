"""The Typer application: every command, in the order of `qatscale --help`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from qatlaw.cli import planner
from qatlaw.judge_cli import judge
from qatscale import __version__
from qatscale.cli.convert import average, convert
from qatscale.cli.evaluate import evaluate, generate
from qatscale.cli.export import export
from qatscale.cli.fit import fit, report
from qatscale.cli.landscape import landscape
from qatscale.cli.launch_scripts import launch_scripts
from qatscale.cli.plan import RecipesAndGpus
from qatscale.cli.prepare import adopt, prepare
from qatscale.cli.quickstart import quickstart
from qatscale.cli.recipes import config, recipes
from qatscale.cli.runs import compare, runs, track_sync
from qatscale.cli.study import study
from qatscale.cli.train import branch, resume, train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich's own markup swallows [default: …]
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"qatscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plan, run and analyse compute-optimal quantization-aware pre-training on DeepSpeed."""


_TAKES_OVERRIDES = (train, resume, branch, convert)
_COMMANDS: tuple[Callable[..., None], ...] = (
    config, recipes, prepare, adopt, train, resume, branch, evaluate, generate, runs, compare, track_sync, export,
    convert, average, fit, report, judge, landscape, quickstart, launch_scripts,
)  # fmt: skip

app.add_typer(planner, name="plan", context_settings={"obj": RecipesAndGpus()})
app.add_typer(study, name="study")
for command in _COMMANDS:
    # `--qat.bits=2` reaches the recipe, whose error names the key that was meant.
    settings = {"ignore_unknown_options": True} if command in _TAKES_OVERRIDES else None
    app.command(context_settings=settings)(command)
