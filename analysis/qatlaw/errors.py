"""What a user of qatlaw reads when an input is wrong. The command line turns it into exit code 2."""

from __future__ import annotations


class LawError(ValueError):
    """A wrong input, told so that the next try can be right.

    The message reads ``key = value: what is allowed. What to do.``
    """

    def __init__(self, key: str, value: object, allowed: str, do: str = "") -> None:
        self.key, self.value, self.allowed, self.do = key, value, allowed, do
        shown = f"{key} = {value!r}" if value is not None else key
        super().__init__(f"{shown}: {allowed}" + (f" {do}" if do else ""))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Exceptions are pickled by their `args`; a pool whose worker raises this one would break without it."""
        return type(self), (self.key, self.value, self.allowed, self.do)
