"""What a user reads when an input is wrong, and the exit codes a script can branch on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qatlaw.errors import InputError

if TYPE_CHECKING:  # every --help reads the exit codes
    from pydantic import ValidationError

EXIT_OK = 0
EXIT_FAILED = 1
"""An unexpected failure: a bug, a dead device, a full disk."""
EXIT_BAD_INPUT = 2
"""The input is wrong; nothing was started."""
EXIT_REQUEUE = 75
"""Stopped by a signal after saving; the same command goes on from there (sysexits.h: EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C, after saving (128 + SIGINT, as shells have it)."""


class UserError(InputError):
    """A wrong input of a run: a recipe's key, an option, a file or a folder."""


class UserErrors(UserError):  # noqa: N818 - several of them
    """Several wrong inputs at once, so that one try corrects them all. `key`, `value`... are those of the first."""

    def __init__(self, problems: Sequence[UserError]) -> None:
        first = problems[0]
        super().__init__(first.key, first.value, first.problem, first.fix)
        self.problems = tuple(problems)
        self.args = ("\n".join([f"{len(problems)} problems:", *(f"  {problem}" for problem in problems)]),)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.problems,)


def first_invalid(error: ValidationError) -> str:
    """Where the first problem of a file's content lies, and what it is: 'plugin.bits: Input should be …'."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "its text"
    return f"{place}: {first['msg']}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where nothing is near."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``Did you mean 'x'?`` or the whole list, whichever helps more."""
    known = sorted(names)
    close = nearest(name, known)
    return f"Did you mean {close!r}?" if close else f"Known: {', '.join(known)}."
