"""Tables for terminals: the one helper that every command draws with.

A number is never cut or broken. A table that is wider than the terminal gives way in this order: headers break at
spaces, words fold, columns leave by priority, and at last every row becomes a list of its cells.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from qatlaw.errors import printable

GAP = "  "
FOLDED = 12
"""Characters that a folded column of words keeps, unless a number in it is longer."""
_NUMBER = re.compile(r"[-+±*(≤~]*[0-9]")


@dataclass
class TextTable:
    """Cells as text, aligned to the right except in the columns of `words`. A cell may have several lines."""

    headers: Sequence[str]
    words: Collection[str] = ()
    """Headers of the columns that are aligned to the left and may fold."""
    title: str = ""
    drop: Sequence[str] = ()
    """Headers of the columns that leave without values and on a narrow terminal, there the first one first."""
    caption: str = ""
    styles: Mapping[str, str] = field(default_factory=dict)
    """Text of a cell -> its style, where the output shows colours."""
    rows: Sequence[Sequence[str]] = ()
    footer: Sequence[str] | None = None

    def add_row(self, *cells: str) -> None:
        assert len(cells) == len(self.headers), cells
        self.rows = [*self.rows, cells]

    def lines(self, width: int) -> Iterator[str]:
        """The table within `width` columns; wider only where a single number and its header are."""
        if self.title:
            yield from folded(self.title, width)
            yield ""
        columns = zip(self.headers, *self.rows, strict=True)
        shown = [i for i, (header, *cells) in enumerate(columns) if header not in self.drop or {*cells} - {"", "–"}]
        drop = [i for header in self.drop for i in shown if self.headers[i] == header]
        while (wide := self._widths(shown, width)) is None and drop:
            shown.remove(drop.pop(0))
        yield from self._records(width) if wide is None else self._columns(shown, wide)
        if self.caption:
            yield from folded(self.caption, width)

    def text(self, width: int) -> str:
        return printable("\n".join(line.rstrip() for line in self.lines(width)))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        shown = Text(self.text(options.max_width), no_wrap=True, overflow="ignore")
        for cell, style in self.styles.items():
            shown.highlight_regex(rf"(?m)(?:^|(?<=  )){re.escape(cell)}(?=  |$)", style)
        yield shown

    def _widths(self, shown: Sequence[int], width: int) -> list[int] | None:
        """The width of each column; None where they do not fit."""
        room = width - len(GAP) * (len(shown) - 1)
        least, cells = [], []
        for column in shown:
            lines = [line for row in self._body for line in row[column].split("\n")]
            words = [word for text in (self.headers[column], *lines) for word in text.split()]
            longest = max(map(len, lines), default=0)
            if self.headers[column] in self.words:
                numbers = [len(word) for word in words if _NUMBER.match(word)]
                narrow = max([*numbers, min(FOLDED, max(map(len, words), default=0))])
            else:
                narrow = max(longest, *map(len, self.headers[column].split()), 0)
            least.append(narrow)
            cells.append(longest)
        if sum(least) > room:
            return None
        wide = list(least)
        # Cells of words get what is left before headers do: a header on two lines reads well, a folded name does not.
        for index in sorted(range(len(wide)), key=lambda index: cells[index]):
            wide[index] += max(0, min(cells[index] - wide[index], room - sum(wide)))
        for index, column in enumerate(shown):
            more = len(self.headers[column]) - wide[index]
            wide[index] += more if 0 < more <= room - sum(wide) else 0
        return wide

    @property
    def _body(self) -> list[Sequence[str]]:
        return [*self.rows, *([self.footer] if self.footer else [])]

    def _columns(self, shown: Sequence[int], wide: Sequence[int]) -> Iterator[str]:
        rule = ["-" * width for width in wide]

        def row(cells: Sequence[str], above: bool = False) -> Iterator[str]:
            stacked = [folded(cells[column], width) for column, width in zip(shown, wide, strict=True)]
            if above:  # headers stand on the rule
                depth = max(map(len, stacked))
                stacked = [[""] * (depth - len(lines)) + lines for lines in stacked]
            for parts in zip_longest(*stacked, fillvalue=""):
                aligned = (
                    part.ljust(width) if self.headers[column] in self.words else part.rjust(width)
                    for column, part, width in zip(shown, parts, wide, strict=True)
                )  # fmt: skip
                yield GAP.join(aligned)

        yield from row(self.headers, above=True)
        yield GAP.join(rule)
        for cells in self.rows:
            yield from row(cells)
        if self.footer:
            yield GAP.join(rule)
            yield from row(self.footer)

    def _records(self, width: int) -> Iterator[str]:
        """Each row as lines of `header: cell`."""
        for cells in self._body:
            for header, cell in zip(self.headers, cells, strict=True):
                if cell:
                    yield from folded(f"{header}: {' '.join(cell.split())}", width)
            yield ""


def folded(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken at spaces, within a word only where it is a longer name."""
    lines: list[str] = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, max(1, width), break_on_hyphens=False, drop_whitespace=True) or [""]
    return lines
