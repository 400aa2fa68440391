"""`qatscale bench`: what this code costs on this machine, beside what does the same elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qatscale.bench.result import Result, Table

bench = typer.Typer(
    help="What this code costs on this machine, beside what does the same elsewhere: tables of ratios.",
    no_args_is_help=True,
)

Peers = Annotated[
    bool,
    typer.Option("--peers", help="Beside other projects, where installed (the extra peers)."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of torch. [default: OMP_NUM_THREADS, or all cores]")]
Quick = Annotated[bool, typer.Option("--quick", help="Few rounds on small sizes: whether it runs, not what it costs.")]
Out = Annotated[Path | None, typer.Option(help="Write the result, with what it was measured on, into this JSON file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@bench.command()
def quantizer(
    peers: Peers = False, threads: Threads = None, quick: Quick = False, out: Out = None, as_json: Json = False
) -> None:
    """Forward and backward of a quantized Linear against a plain one."""
    from qatscale.bench.quantizer import run

    _show(run(peers=peers, threads=threads, quick=quick), out, as_json)


@bench.command()
def checkpoint(
    recipe: Annotated[str, typer.Option(help="The size of the model. [default: 86m]")] = "",
    folder: Annotated[Path, typer.Option(help="On the disk to be measured; left as it was.")] = Path(),
    peers: Peers = False,
    threads: Threads = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """How long training stands still for a checkpoint, until it is on disk, and how long loading takes."""
    from qatscale.bench.checkpoint import run

    _show(run(peers=peers, threads=threads, quick=quick, recipe=recipe or None, folder=folder), out, as_json)


@bench.command()
def data(
    text: Annotated[
        str | None, typer.Option(help="Text to use, as `qatscale prepare` takes it: a file, a folder. [default: self]")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one per core]")] = None,
    peers: Peers = False,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Text to tokens, tokens to batches, and how long opening a billion tokens takes."""
    from qatscale.bench.data import run

    _show(run(peers=peers, workers=workers, quick=quick, text=text), out, as_json)


@bench.command()
def step(
    recipe: Annotated[
        str, typer.Option(help="The model, batch and optimizer: a recipe's name or file.")
    ] = "quickstart",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model's blocks, as engine.compile=on.")
    ] = False,
    peers: Peers = False,
    threads: Threads = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Training tokens per second: our step, a bare PyTorch loop, other models; full precision and QAT."""
    from qatscale.bench.step import run

    _show(run(peers=peers, threads=threads, quick=quick, recipe=recipe, compiled=compiled), out, as_json)


def _show(result: Result, out: Path | None, as_json: bool) -> None:
    from qatscale.cli.terminal import console

    if out is not None:
        result.write(out)
    if as_json:
        print(json.dumps(result.as_json(), indent=1))
        return
    shown = console()
    shown.print(", ".join(f"{key} {value}" for key, value in result.settings.items()))
    for table in result.tables:
        shown.print()
        _print_table(table)


def _print_table(table: Table) -> None:
    from qatscale.cli.terminal import console, plain_table

    extras = list(dict.fromkeys(key for row in table.rows for key in row.extra))
    numbers = ("time", f"{table.unit}/s", "ratio", "quartiles", *extras)
    shown = plain_table("", *numbers, right=numbers, title=table.title)
    for row in table.rows:
        low, high = row.ratio_quartiles
        figures = (shown_seconds(row.seconds), _shown(row.per_second), f"{row.ratio:.3f}", f"{low:.3f} to {high:.3f}")
        shown.add_row(row.name, *figures, *(_shown(row.extra.get(key)) for key in extras))
    console().print(shown)
    console().print(f"ratio: time over that of {table.reference} in the same round; median and quartiles of the rounds")
    for skipped in table.skipped:
        console().print(f"skipped {skipped.name}: {skipped.why}")
    for note in table.notes:
        console().print(note)


def shown_seconds(seconds: float) -> str:
    """Three or more significant digits, in the unit that suits: '12.3 ms'."""
    unit, factor = next(
        ((unit, factor) for unit, factor in (("s", 1.0), ("ms", 1e3)) if seconds * factor >= 1), ("µs", 1e6)
    )
    return f"{_shown(seconds * factor)} {unit}"


def _shown(value: float | str | None) -> str:
    """Numbers with three significant digits, or all before the point."""
    if value is None or isinstance(value, str):
        return value or ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
