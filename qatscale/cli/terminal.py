"""Where the commands print their tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from qatscale.errors import UserError

FIGURES = (".png", ".svg", ".pdf")
_WIDTH_OF_A_FILE = 120
"""A file or a pipe has no width; rich would take 80 columns and cut tables short."""


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDTH_OF_A_FILE)


def check_figure(path: Path | None) -> None:
    """UserError for a figure of a format that cannot be written, before anything is computed for it."""
    if path is not None and path.suffix.lower() not in FIGURES:
        raise UserError("--figure", str(path), f"the ending chooses the format: {', '.join(FIGURES)}.")


def plain_table(*headers: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table that folds what does not fit, so that no number is ever cut; headers in `right` are right-aligned."""
    from rich import box

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table
