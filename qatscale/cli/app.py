"""The Typer application: every command, in the order of `qatscale --help`. A command is imported when it is used."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from qatscale import __version__

COMMANDS = {  # name → its module
    "config": "qatscale.cli.recipes", "recipes": "qatscale.cli.recipes",
    "prepare": "qatscale.cli.prepare", "adopt": "qatscale.cli.prepare",
    "train": "qatscale.cli.train", "resume": "qatscale.cli.train", "branch": "qatscale.cli.train",
    "evaluate": "qatscale.cli.evaluate", "generate": "qatscale.cli.evaluate",
    "runs": "qatscale.cli.runs", "compare": "qatscale.cli.runs", "track-sync": "qatscale.cli.runs",
    "export": "qatscale.cli.export", "convert": "qatscale.cli.convert", "average": "qatscale.cli.convert",
    "fit": "qatscale.cli.fit", "report": "qatscale.cli.fit", "judge": "qatlaw.judge_cli",
    "landscape": "qatscale.cli.landscape", "quickstart": "qatscale.cli.quickstart",
    "launch-scripts": "qatscale.cli.launch_scripts", "plan": "qatscale.cli.plan", "study": "qatscale.cli.study",
}  # fmt: skip
_GROUPS = {
    "plan": "When should a run switch from full precision to QAT? The commands below answer other questions.",
    "study": "Studies: grids of runs that share their trunks.",
}
"""The lines about those that hold commands of their own."""
_TAKES_OVERRIDES = ("train", "resume", "branch", "convert")

if _shown_type := getattr(TyperOption, "display_type_rich", None):  # of recent versions; help then says `--json <bool>`
    cast(Any, TyperOption).display_type_rich = lambda o, ctx: None if o.is_flag else _shown_type(o, ctx=ctx)


class _Imported(Mapping[str, Any]):
    """COMMANDS by name; the module of a command is imported when the command is looked up."""

    def __getitem__(self, name: str) -> Any:
        command = getattr(import_module(COMMANDS[name]), name.replace("-", "_"))
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
        lines: dict[str, Any] = {name: TyperCommand(name, help=_line(name)) for name in COMMANDS}
        listing = TyperGroup(name=self.name, commands=lines, params=self.params, help=self.help)
        listing.rich_markup_mode = self.rich_markup_mode
        listing.format_help(ctx, formatter)


def _line(name: str) -> str:
    """What `qatscale --help` says of a command: the first paragraph of its docstring, read without importing it."""
    if name in _GROUPS:
        return _GROUPS[name]
    place = find_spec(COMMANDS[name])
    assert place is not None
    tree = ast.parse(Path(place.origin or "").read_text(encoding="utf-8"))
    function = name.replace("-", "_")
    texts = (ast.get_docstring(n) for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    return " ".join((next(texts) or "").partition("\n\n")[0].split())


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
