"""Text and benchmark scores from the command line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qatscale.cli.terminal import console, plain_table
from qatscale.errors import UserError


def print_text(model: str, prompt: str, view: str | None, **sampling: Any) -> None:
    """Write the prompt and what follows to standard output, all else to standard error."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # clients draw progress bars while they load, amid the text
    from qatscale.inference.generate import open_text_generator
    from qatscale.inference.sampling import Sampling, prompt_ids

    settings = Sampling(**sampling)
    if view not in (None, "fp", "quantized"):
        raise UserError("--view", view, "must be fp or quantized.")
    text = sys.stdin.read() if prompt == "-" else prompt
    generator = open_text_generator(model, view)
    ids = prompt_ids(generator, text, settings)
    print(generator.about, file=sys.stderr)
    _write(text)
    generator.stream(ids, settings, _write)
    _write("\n")


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()  # it is read while it is generated


def print_harness(
    model: str, tasks: str, folder: Path | None, shots: int | None, limit: int | None, batch: int, as_json: bool
) -> None:
    from qatscale.inference.generate import open_transformers
    from qatscale.inference.harness import open_tasks, run_harness

    named = [task.strip() for task in tasks.split(",") if task.strip()]
    manager = open_tasks(named, folder)
    judged = open_transformers(model)
    scores = run_harness(judged, named, manager, shots=shots, limit=limit, batch=batch)
    if as_json:
        print(
            json.dumps({"model": judged.about, "limit": limit, "scores": [asdict(score) for score in scores]}, indent=1)
        )
        return
    numbers = ("score", "± standard error", "shots", "questions")
    part = "" if limit is None else f", the first {limit} questions of each task: not the benchmark's score"
    table = plain_table("task", "metric", *numbers, right=numbers, title=f"{judged.about}{part}")
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        error = "" if score.error is None else f"{score.error:.4f}"
        table.add_row(
            score.task,
            metric,
            f"{score.value:.4f}",
            error,
            *("" if n is None else f"{n:,}" for n in (score.shots, score.questions)),
        )
    console().print(table)
