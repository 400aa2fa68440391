"""Shared by the commands: tables, common options and checks of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from qatlaw.bit_widths import BIT_WIDTHS, BIT_WIDTHS_TEXT
from qatlaw.errors import printable
from qatlaw.text import terminal_width, wrapped
from qatscale.cli import completion
from qatscale.errors import UserError

FIGURES = (".png", ".svg", ".pdf")

_DS_CONFIG = ("--deepspeed", "--deepspeed_config", "--deepspeed-config")


def as_overrides(words: list[str] | None) -> list[str]:
    """Overrides in which other programs' `--deepspeed FILE` has become engine.ds_config=FILE."""
    found, rest = [], list(words or ())
    while rest:
        option, equals, value = (word := rest.pop(0)).partition("=")
        if option not in _DS_CONFIG:
            found.append(word)
        elif equals or (rest and not rest[0].startswith("-") and "=" not in rest[0]):
            found.append(f"engine.ds_config={value if equals else rest.pop(0)}")
        elif option != "--deepspeed":  # alone it is a switch, which has no effect here
            raise UserError(option, None, "takes the path of a ds_config.", "Add it, or leave the option out.")
    return found


def run_argument(text: str) -> Any:
    """The argument for a run's folder, or one of its checkpoints."""
    return typer.Argument(help=text, autocompletion=completion.run)


Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides of the recipe: tokens=2.3B qat.bits=2.",
        callback=as_overrides,
        autocompletion=completion.override,
    ),
]


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=terminal_width())


def say(text: str, style: str = "") -> None:
    """A sentence: folded between words on a terminal, one line in a file."""
    out = console()
    shown = wrapped(printable(text), out.width) if out.is_terminal else printable(text)
    out.print(shown, style=style, markup=False, soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """A context with a status line on the terminal, for slow work. It yields a function that changes the text."""
    with Console(stderr=True).status(what) as status:
        yield status.update


def check_figure(path: Path | None) -> None:
    """UserError for a figure of a format that cannot be written, before anything is computed for it."""
    if path is not None and path.suffix.lower() not in FIGURES:
        raise UserError("--figure", str(path), f"the ending chooses the format: {', '.join(FIGURES)}.")


def check_bits(option: str, bits: float) -> None:
    if bits not in BIT_WIDTHS:
        shown = int(bits) if bits.is_integer() else bits
        raise UserError(option, shown, f"must be one of {BIT_WIDTHS_TEXT}.")


def refuse(options: Mapping[str, object], problem: str, fix: str = "Add it, or leave this out.") -> None:
    """UserError for the first of the options that was given."""
    for option, value in options.items():
        if value is not None and value is not False:
            raise UserError(option, None, problem, fix)
