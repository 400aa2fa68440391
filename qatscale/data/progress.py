"""What a person sees of `prepare`: a live bar on a terminal, a line per shard in a log, nothing without a console."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console


class Watch:
    """Nobody watches."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def say(self, text: str) -> None: ...

    def update(self, documents: int, tokens: int, text_bytes: int, fraction: float | None) -> None:
        """Totals so far; `fraction` of the sources read, None = nobody knows."""


class LogWatch(Watch):
    """Plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class LiveWatch(LogWatch):
    """A bar with documents, tokens, MB/s of text and the time left."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().__init__(console)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("prepare", total=None, counts="")
        self._start: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, documents: int, tokens: int, text_bytes: int, fraction: float | None) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = now, text_bytes
        rate = (text_bytes - self._start[1]) / 1e6 / max(1e-9, now - self._start[0])
        counts = f"{documents:,} documents  {tokens:,} tokens  {rate:.1f} MB/s"
        self._bar.update(self._task, counts=counts, completed=fraction or 0.0, total=None if fraction is None else 1.0)


def watch(console: Console | None) -> Watch:
    if console is None:
        return Watch()
    return LiveWatch(console) if console.is_terminal else LogWatch(console)
