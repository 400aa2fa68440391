"""Sentences for terminals."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence


def terminal_width() -> int:
    """Columns of the terminal. COLUMNS overrides it; a file or a pipe has 120 without it."""
    return shutil.get_terminal_size((120, 24)).columns


def plural(count: int, noun: str) -> str:
    """'1 process', '2 processes'."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


def listed(names: Sequence[str]) -> str:
    """'a, b, c and 2 more'."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def wrapped(sentence: str, width: int) -> str:
    """Lines of a terminal, broken at spaces only: a path stays in one piece and can be copied."""
    return textwrap.fill(sentence, width, break_long_words=False, break_on_hyphens=False)
