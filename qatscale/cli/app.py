"""The Typer application: every command, in the order of `qatscale --help`. A command is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from qatscale import __version__

COMMANDS = {  # name: its module, and the line about it in `qatscale --help`
    "config": (
        "qatscale.cli.recipes",
        "Print every key of a recipe with its type, default and meaning; for a recipe its keys and values, as YAML.",
    ),
    "recipes": ("qatscale.cli.recipes", "List the recipes that come with qatscale."),
    "prepare": (
        "qatscale.cli.prepare",
        "Turn text into token shards (Megatron .bin/.idx) with tokenizer, held-out split and manifest.",
    ),
    "adopt": (
        "qatscale.cli.prepare",
        "Make token shards of other programs usable as they are: write a manifest beside them.",
    ),
    "train": ("qatscale.cli.train", "Train a run, or continue it where it stopped."),
    "resume": (
        "qatscale.cli.train",
        "Continue a stopped run from its newest checkpoint. Overrides may not change the result.",
    ),
    "branch": (
        "qatscale.cli.train",
        "Start a new run from another run's checkpoint: QAT at some bit width, another cooldown, other betas.",
    ),
    "evaluate": (
        "qatscale.cli.evaluate",
        "Print validation loss and perplexity in the full-precision, quantized and post-training-quantized view.",
    ),
    "generate": (
        "qatscale.cli.evaluate",
        "Continue a prompt with text from a model, printed as it is generated.",
    ),
    "runs": ("qatscale.cli.runs", "Print a table of runs."),
    "compare": (
        "qatscale.cli.runs",
        "Print runs side by side: losses in each view, switch, speeds; with --figure their loss curves.",
    ),
    "track-sync": ("qatscale.cli.runs", "Upload to MLflow what an unreachable server missed."),
    "export": (
        "qatscale.cli.export",
        "Write a model for the programs that run it, with the weights of the trained forward pass.",
    ),
    "convert": (
        "qatscale.cli.convert",
        "Convert a training checkpoint, DeepSpeed's universal layout or a Hugging Face folder to another of the three.",
    ),
    "average": (
        "qatscale.cli.convert",
        "Average the weights of checkpoints, of several runs or of a window of one, into a run's folder.",
    ),
    "fit": (
        "qatscale.cli.fit",
        "Fit the loss law to finished runs; print coefficients with intervals, quality and rival laws; write fit.json.",
    ),
    "report": (
        "qatscale.cli.fit",
        "Write one self-contained HTML page about runs: the law, its figures, and which runs were left out.",
    ),
    "judge": (
        "qatlaw.judge_cli",
        "Which law predicts which runs? Published laws, and yours, against tables of runs.",
    ),
    "landscape": (
        "qatscale.cli.landscape",
        "Measure and draw the loss around a cooldown: a valley or a bowl, in full precision and quantized.",
    ),
    "quickstart": (
        "qatscale.cli.quickstart",
        "Train a trunk and three branches on text that is already on this machine, in minutes on two cores.",
    ),
    "launch-scripts": (
        "qatscale.cli.launch_scripts",
        "Write the scripts that start a job on several hosts: pdsh, no ssh, OpenMPI, MPICH, Slurm.",
    ),
    "plan": (
        "qatscale.cli.plan",
        "When should a run switch from full precision to QAT? The commands below answer other questions.",
    ),
    "study": ("qatscale.cli.study", "Studies: grids of runs that share their trunks."),
}
_TAKES_OVERRIDES = ("train", "resume", "branch", "convert")

if _shown_type := getattr(TyperOption, "display_type_rich", None):  # of recent versions; help then says `--json <bool>`
    _typed: Any = TyperOption
    _typed.display_type_rich = lambda option, ctx: None if option.is_flag else _shown_type(option, ctx=ctx)


class _Imported(Mapping[str, Any]):
    """COMMANDS by name; the module of a command is imported when the command is looked up."""

    def __getitem__(self, name: str) -> Any:
        module, _ = COMMANDS[name]
        command = getattr(import_module(module), name.replace("-", "_"))
        holder = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
        holder.callback()(_options)
        if isinstance(command, typer.Typer):
            holder.add_typer(command, name=name)
        else:
            # `--qat.bits=2` reaches the recipe, whose error names the key that was meant.
            settings = {"ignore_unknown_options": True} if name in _TAKES_OVERRIDES else None
            holder.command(context_settings=settings)(command)
        group: Any = typer.main.get_command(holder)
        return group.commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Commands(TyperGroup):
    """The program. Its help imports no command."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = _Imported()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - Typer's signature
        return list(COMMANDS)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        lines: dict[str, Any] = {name: TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()}
        listing = TyperGroup(name=self.name, commands=lines, params=self.params, help=self.help)
        listing.rich_markup_mode = self.rich_markup_mode
        listing.format_help(ctx, formatter)


app = typer.Typer(
    cls=_Commands,
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
