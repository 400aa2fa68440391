"""The console of a run: a line per logging step, notices between them, a progress bar on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import IO, Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qatscale.config.amounts import format_amount


def format_metrics(record: Mapping[str, Any], total_steps: int) -> str:
    """One line for a `metrics` record of metrics.jsonl. Values are named, so that a line reads alone and greps well.

    Left out are the MFU where the device's peak is unknown, the ETA where no speed is known, and the share of scales at
    their floor where it is 0.
    """
    step = record["step"]
    parts = [
        f"step {step:>{len(str(total_steps))}}/{total_steps}",
        f"{format_amount(record['tokens']):>6} tokens",
        f"{record['phase']:<12}",
        f"loss {record['loss']:.4f}",
        f"lr {record['learning_rate']:.2e}",
        f"grad norm {record['grad_norm']:.3f}",
        *([f"floored {record['scales_floored']:.1%}"] if record.get("scales_floored") else []),
        f"{format_amount(record['tokens_per_second'])} tok/s",
        f"{record['tflops']:.3g} TFLOP/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts.append(f"{record['memory_gib']:.2f} GiB")
    parts.append(f"data {format_duration(record['data_seconds'])}")
    left = eta_seconds(record, total_steps)
    if left is not None:
        parts.append(f"ETA {format_duration(left)}")
    return "  ".join(parts)


def eta_seconds(record: Mapping[str, Any], total_steps: int) -> float | None:
    """Seconds that the remaining steps take at the record's tokens per second; None without a speed.

    A QAT step costs more than a full-precision one, so before the switch this is a lower bound.
    """
    speed = record["tokens_per_second"]
    if not record["step"] or not speed or not math.isfinite(speed):
        return None
    return (total_steps - record["step"]) * (record["tokens"] / record["step"]) / speed


def format_duration(seconds: float) -> str:
    """0.0123 -> '12 ms', 75 -> '1m15s', 93784 -> '1d02h'."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest} s"


class RunConsole:
    """The console of a process, a context so that a progress bar never outlives an error; silent but on rank 0.

    A progress bar under the lines when `stream` is a terminal, otherwise plain lines, flushed one by one.
    """

    def __init__(self, rank: int, total_steps: int, start_step: int = 0, stream: IO[str] | None = None) -> None:
        self.total_steps = total_steps
        self._stream = stream if stream is not None else sys.stdout
        watched = self._stream.isatty()
        # a file has no width; a table in it must not be folded to 80 columns
        self._console = Console(file=self._stream, highlight=False, width=None if watched else 160, quiet=rank != 0)
        self._progress = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=self._console,
            disable=not watched or rank != 0,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(
            "train", total=total_steps, completed=start_step, phase="", loss="–", eta="–"
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def notice(self, text: str) -> None:
        """One line of plain text."""
        # soft_wrap leaves line breaks to the terminal, so that a copied line is one line
        self._console.print(text, markup=False, soft_wrap=True)
        self._stream.flush()

    def show(self, what: RenderableType) -> None:
        """Anything rich can draw."""
        self._console.print(what)
        self._stream.flush()

    def advance(self, step: int) -> None:
        """Optimizer steps done; moves the bar between metrics lines."""
        self._progress.update(self._task, completed=step)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """A `metrics` record, as written to metrics.jsonl."""
        left = eta_seconds(record, self.total_steps)
        self._progress.update(
            self._task,
            completed=record["step"],
            phase=record["phase"],
            loss=f"{record['loss']:.4f}",
            eta="–" if left is None else format_duration(left),
        )
        self.notice(format_metrics(record, self.total_steps))

    def validation(self, record: Mapping[str, Any]) -> None:
        """A `validation` record."""
        self.notice(
            f"step {record['step']}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.5g} "
            f"({record['view']} view)"
        )
