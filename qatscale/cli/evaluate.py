"""`qatscale evaluate` and `generate`: losses, benchmark scores and text of a model."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qatlaw.text import listed, plural
from qatlaw.text_table import TextTable
from qatscale.cli.terminal import Json, check_bits, console, refuse, run_argument, working
from qatscale.errors import UserError, fault, first_line


def evaluate(
    checkpoint: Annotated[str, run_argument("RUN, RUN@STEP or a checkpoint folder; with --harness also an export.")],
    ptq: Annotated[
        list[float] | None, typer.Option(help="Also after post-training quantization to this many bits.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared data instead of the run's own.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Held-out tokens to use, instead of the recipe's: 1M.")] = None,
    harness: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Run tasks of lm-evaluation-harness instead: arc_easy,hellaswag."),
    ] = None,
    tasks_folder: Annotated[
        Path | None,
        typer.Option(help="With --harness: a folder of task definitions, YAML and templates without Python functions."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="With --harness: worked examples. [default: the task's]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --harness: questions of each task. [default: all]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="With --harness: texts at a time. [default: 8]")] = None,
    as_json: Json = False,
) -> None:
    """Print validation loss and perplexity in the full-precision, quantized and post-training-quantized view.

    With --harness it prints the scores of EleutherAI's lm-evaluation-harness instead. It then takes a checkpoint,
    quantized once it has switched, or an exported folder that transformers loads.
    """
    if harness is not None:
        given = {"--ptq": ptq or None, "--data": data, "--tokens": tokens}
        refuse(given, "has no effect with --harness, whose tasks bring their data.", "Leave it out.")
        _print_harness(checkpoint, harness, tasks_folder, shots, limit, batch or 8, as_json)
        return
    only = {"--tasks-folder": tasks_folder, "--shots": shots, "--limit": limit}
    refuse(only | {"--batch": batch}, "has no effect without --harness.")
    from qatscale.config.amounts import positive_amount
    from qatscale.tracking.compare import view_label
    from qatscale.tracking.run_folder import perplexity
    from qatscale.train.evaluate import evaluate_checkpoint

    for bits in ptq or ():
        check_bits("--ptq", bits)
    most = None if tokens is None else positive_amount("--tokens", tokens)
    with working("reading the checkpoint") as progress:
        found, counted, losses = evaluate_checkpoint(checkpoint, ptq or (), data, most, progress)
    if overflowing := [view_label(view) for view, loss in losses.items() if not math.isfinite(loss)]:
        raise FloatingPointError(f"{found}: the validation loss is not finite in {listed(overflowing)}.")
    if as_json:
        views = {view: {"loss": loss, "perplexity": perplexity(loss)} for view, loss in losses.items()}
        print(json.dumps({"checkpoint": str(found), "tokens": counted, "views": views}, indent=2))
        return
    title = f"{found}: {counted:,} held-out tokens"
    table = TextTable(("view", "validation loss", "perplexity"), words=["view"], title=title)
    for view, loss in losses.items():
        table.add_row(view_label(view), f"{loss:.4f}", f"{perplexity(loss):.4g}")
    console().print(table)


def _print_harness(
    model: str, tasks: str, folder: Path | None, shots: int | None, limit: int | None, batch: int, as_json: bool
) -> None:
    from qatscale.inference.generate import open_transformers
    from qatscale.inference.harness import open_tasks, run_harness

    named = [task.strip() for task in tasks.split(",") if task.strip()]
    manager = open_tasks(named, folder)
    judged = open_transformers(model)
    scores = run_harness(judged, named, manager, shots=shots, limit=limit, batch=batch)
    if as_json:
        rows = [asdict(score) for score in scores]
        print(json.dumps({"model": judged.about, "limit": limit, "scores": rows}, indent=1))
        return
    words = ("task", "metric")
    part = "" if limit is None else f", the first {plural(limit, 'question')} of each task: not the benchmark's score"
    table = TextTable((*words, "score", "± standard error", "shots", "questions"), words, f"{judged.about}{part}")
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        error = "" if score.error is None else f"{score.error:.4f}"
        counts = ("" if count is None else f"{count:,}" for count in (score.shots, score.questions))
        table.add_row(score.task, metric, f"{score.value:.4f}", error, *counts)
    console().print(table)


def generate(
    model: Annotated[str, run_argument("RUN, RUN@STEP, a checkpoint folder, or an exported folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads standard input.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate at most; the model may end its text earlier.")] = 128,
    temperature: Annotated[float, typer.Option(help="Temperature of the draws; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among this many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens with this total probability.")] = 0.95,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the draws; equal seeds give equal text.")
    ] = 0,
    view: Annotated[
        str | None,
        typer.Option(help="View of a checkpoint's weights: fp or quantized. [default: quantized once it has switched]"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prepared data with a checkpoint's tokenizer, instead of the run's own.")
    ] = None,
) -> None:
    """Continue a prompt with text from a model, printed as it is generated."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # clients would draw progress bars into the generated text
    from qatscale.inference.generate import open_text_generator
    from qatscale.inference.sampling import Sampling, prompt_ids

    settings = Sampling(tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if view not in (None, "fp", "quantized"):
        raise UserError("--view", view, "must be fp or quantized.")
    text = sys.stdin.read() if prompt == "-" else prompt
    generator = open_text_generator(model, view, data)
    try:
        ids = prompt_ids(generator, text, settings)
        print(generator.about, file=sys.stderr)
        _write(text)
        generator.stream(ids, settings, _write)
    except (RuntimeError, TypeError, ValueError) as error:  # of libraries, for values in the folder's files
        if isinstance(error, UserError) or fault(error):
            raise
        raise UserError("model", model, f"cannot generate: {first_line(error)}.") from error
    _write("\n")


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()  # the reader sees each piece as it comes
