"""The error for a wrong input. Command lines print its message and exit with code 2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """A wrong input, with what the problem is and how to fix it.

    The message reads ``key = value: problem fix``, each of them a sentence; ``key: problem fix`` where value is None.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str = "") -> None:
        self.key, self.value, self.problem, self.fix = key, value, problem, fix
        shown = f"{_shown(key)} = {_shown(repr(value))}" if value is not None else _shown(key)
        super().__init__(f"{shown}: {_shown(problem, 2000)}" + (f" {_shown(fix, 1000)}" if fix else ""))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Exceptions are pickled by their `args`; a pool whose worker raises this one would break without it."""
        return type(self), (self.key, self.value, self.problem, self.fix)


_USER = re.compile(r"(?<=://)(?:[^\s/:]*:(?!\d+(?:[/?#]|$))\S*|[^\s/?#]+)@")
"""`user@`, `token@` or `user:password@` of an address. A password may hold any character but a blank."""
_SECRET = re.compile(
    r"(?<=[?&;])([^=&\s]*(?:user|pass|pwd|token|secret|key|auth|sig|odbc_connect)[^=&\s]*=)[^&\s#'\"]*", re.I
)
"""A value of an address's query that is a credential, or holds one, by its name."""


def without_credentials(text: str) -> str:
    """An address, or a text with addresses, without user names, passwords and tokens.

    >>> without_credentials("https://me:secret@host:5000/path?token=abc&x=1")
    'https://host:5000/path?token=&x=1'
    """
    return _SECRET.sub(r"\1", _USER.sub("", text))


CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
"""Characters that move the cursor, colour or reorder what a terminal shows; line breaks and tabs are none."""


def printable(text: str) -> str:
    """Names and values from files, for a terminal: what would steer it is spelled out."""
    return re.sub(CONTROL, lambda found: ascii(found[0])[1:-1], text)


def _shown(text: str, length: int = 100) -> str:
    return printable(cut(without_credentials(text), length))


def cut(text: str, length: int = 100) -> str:
    """At most about `length` characters, without the middle of what is longer; a path may have a few more."""
    length *= 3 if "/" in text else 1
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-length // 2 :]}"


def first_invalid(error: Any) -> str:
    """Where the first problem of pydantic's ValidationError lies, and what it is: 'plugin.bits: Input should be …'."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "its text"
    return f"{cut(place)}: {first['msg']}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where nothing is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return found[0] if found else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``Did you mean 'x'?``, or the entire list where nothing is near."""
    known = sorted(names)
    close = nearest(name, known)
    return f"Did you mean {close!r}?" if close else f"Known: {', '.join(known) or 'none'}."
