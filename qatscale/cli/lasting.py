"""Output that outlives its reader: a closed terminal, a lost ssh connection, a launcher that was killed."""

from __future__ import annotations

from typing import Any, TextIO


class Lasting:
    """A text stream in which what nobody reads any more is lost, instead of failing whoever writes it.

    When a launcher is ended, so is the pipe to it, and the next line on the console would be an error
    (BrokenPipeError) in the middle of a step, before the signal to save has even come.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
