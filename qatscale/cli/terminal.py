"""What commands share: their tables, common options and checks of options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qatlaw.bit_widths import BIT_WIDTHS, BIT_WIDTHS_TEXT
from qatscale.errors import UserError

FIGURES = (".png", ".svg", ".pdf")
_WIDTH_OF_A_FILE = 120
"""A file or a pipe has no width; rich would take 80 columns and cut tables short."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Overrides of the recipe: tokens=2.3B qat.bits=2."),
]


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDTH_OF_A_FILE)


def plain_table(*headers: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table that folds what does not fit, so that no number is ever cut; headers in `right` are right-aligned."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


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
