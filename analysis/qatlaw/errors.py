"""The error for a wrong input. Command lines print its message and exit with code 2."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong input, with what the problem is and how to fix it.

    The message reads ``key = value: problem fix``, each of them a sentence; ``key: problem fix`` where value is None.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str = "") -> None:
        self.key, self.value, self.problem, self.fix = key, value, problem, fix
        shown = f"{key} = {value!r}" if value is not None else key
        super().__init__(f"{shown}: {problem}" + (f" {fix}" if fix else ""))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Exceptions are pickled by their `args`; a pool whose worker raises this one would break without it."""
        return type(self), (self.key, self.value, self.problem, self.fix)
