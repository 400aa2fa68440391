"""Output that outlives its reader: a closed terminal, a lost ssh connection, a launcher that was killed."""

from __future__ import annotations

import errno
import os
import re
import select
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from qatlaw.errors import CONTROL, printable

PATIENCE = 10.0
"""Seconds that a run waits for a console that is held: Ctrl-S on a terminal, a reader that was stopped."""
_UNUSUAL = rf"(?!\x1b\[(?:[\d;]*[AKm]|\?25[hl])){CONTROL}"
"""Where rich draws: all but its colours, and the moves of a table that is drawn again."""


class IgnoreBrokenPipe:
    """A text stream whose writer does not fail when nobody reads any more: what it writes then is lost.

    When a launcher is killed, the pipe to it breaks. The next line on the console would otherwise raise BrokenPipeError
    in the middle of a step, before the signal to save has even arrived. Nor does it fail for a character that the
    console lacks. What would steer a terminal is spelled out: a model or a file may hold it.
    """

    def __init__(self, stream: TextIO | None, patience: float | None = None) -> None:
        """stream: None where whoever started the process has closed it. patience: None waits for ever."""
        self._stream = stream or Path(os.devnull).open("w")  # noqa: SIM115 - it takes the free number, not a file
        if reconfigure := getattr(self._stream, "reconfigure", None):
            reconfigure(errors="replace")
        self._lost: OSError | None = None
        self._patience = patience

    def _is_held(self) -> bool:
        """Whether nobody reads. After PATIENCE what is written is lost, without another wait, until somebody does."""
        ready = True
        if self._patience is not None:
            with suppress(OSError, ValueError):  # a stream without a file descriptor
                ready = bool(select.select([], [self._stream], [], self._patience)[1])
                self._patience = PATIENCE if ready else 0.0
        return not ready

    def write(self, text: str) -> int:
        drawn = self._stream.isatty() or "FORCE_COLOR" in os.environ
        steering = _UNUSUAL if drawn else CONTROL
        text = re.sub(steering, lambda found: found[0] if found[0] == "\r" else printable(found[0]), text)
        try:
            return len(text) if self._is_held() else self._stream.write(text)
        except OSError as error:
            self._lost = error
            return len(text)

    def flush(self) -> None:
        try:
            if not self._is_held():
                self._stream.flush()
        except OSError as error:
            self._lost = error

    def finish(self) -> None:
        """Flush. Raises what a full disk lost of the output; readers that have gone wanted no more."""
        self.flush()
        if self._lost is not None and self._lost.errno not in (errno.EPIPE, errno.EIO):
            raise self._lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
