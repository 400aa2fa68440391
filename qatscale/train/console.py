"""The console of a run: a line per logging step, notices between them, a progress bar on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qatlaw.errors import printable
from qatlaw.text import terminal_width, wrapped
from qatscale.config.amounts import format_amount

ONE_LINE = 120
"""Columns from which a metrics record takes one line; below it takes two."""
SLOW_DATA = 0.05
"""Share of the time spent on reading batches from which the line shows it."""


def format_metrics(record: Mapping[str, Any], total_steps: int, width: int = ONE_LINE) -> str:
    """A `metrics` record of metrics.jsonl in a line of at most ONE_LINE characters, or in two of a narrow terminal.

    Values are named, so that a line reads alone and greps well. The least important ones leave where they do not fit.
    """
    step, left = record["step"], eta_seconds(record, total_steps)
    data = record["data_seconds"] / (record["steps"] * (_step_seconds(record) or math.inf))
    parts = {
        "step": f"step {step:>{len(str(total_steps))}}/{total_steps}",
        "tokens": f"{format_amount(record['tokens']):>6} tokens",
        "phase": f"{record['phase']:<12}",
        "loss": f"loss {record['loss']:.4f}",
        "lr": f"lr {record['learning_rate']:.2e}",
        "grad": f"grad {record['grad_norm']:.3f}",
        "floored": f"floored {record['scales_floored']:.1%}" if record.get("scales_floored") else "",
        "speed": f"{format_amount(record['tokens_per_second'])} tok/s",
        "flops": f"{record['tflops']:.3g} TFLOP/s" if record.get("mfu") is None else f"MFU {record['mfu']:.1%}",
        "memory": f"{record['memory_gib']:.2f} GiB",
        "data": f"data {data:.0%}" if data >= SLOW_DATA else "",
        "ETA": f"ETA {format_duration(left)}" if left else "",
    }
    for dropped in ("", "flops", "memory", "tokens", "lr", "data"):
        parts[dropped] = ""
        lines = _packed([part for part in parts.values() if part], min(width, ONE_LINE))
        if len(lines) <= (1 if width >= ONE_LINE else 2):
            break
    return "\n".join(lines)


def _packed(parts: Sequence[str], width: int) -> list[str]:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}")
    return lines


def eta_seconds(record: Mapping[str, Any], total_steps: int) -> float | None:
    """Seconds that the remaining steps take at the record's tokens per second; None without a speed.

    A QAT step costs more than a full-precision one, so before the switch this is a lower bound.
    """
    seconds = _step_seconds(record)
    return None if seconds is None else (total_steps - record["step"]) * seconds


def _step_seconds(record: Mapping[str, Any]) -> float | None:
    """None without a speed."""
    speed = record["tokens_per_second"]
    if not record["step"] or not speed or not math.isfinite(speed):
        return None
    return float(record["tokens"] / record["step"] / speed)


def format_duration(seconds: float) -> str:
    """0.97 -> '1 s', 75 -> '1m15s', 93784 -> '1d02h'."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds) or math.ceil(seconds), 60)
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
        stream = stream if stream is not None else sys.stdout
        watched = stream.isatty()
        width = None if watched else terminal_width()
        self._console = Console(file=stream, highlight=False, width=width, quiet=rank != 0)
        self._progress = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("loss {task.fields[loss]}"),
            *([TimeElapsedColumn()] if self._console.width >= 80 else []),
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
        """Plain text: one line in a file, folded between words on a terminal."""
        text = printable(text)  # it may hold an error of another run
        shown = wrapped(text, self._console.width) if self._console.is_terminal else text
        self._console.print(shown, markup=False, soft_wrap=True)

    def show(self, what: RenderableType) -> None:
        """Anything rich can draw."""
        self._console.print(what)

    def advance(self, step: int) -> None:
        """Optimizer steps done; moves the bar between metrics lines."""
        if not self._progress.disable:
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
        self._console.print(format_metrics(record, self.total_steps, self._console.width), markup=False, soft_wrap=True)

    def validation(self, record: Mapping[str, Any]) -> None:
        self.notice(
            f"step {record['step']}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.5g} "
            f"({record['view']} view)"
        )
