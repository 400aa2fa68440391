"""`qatscale landscape`: the loss on a plane through the weights of two checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qatlaw.text import plural
from qatlaw.text_table import TextTable
from qatscale.cli.terminal import console, run_argument, say, working
from qatscale.errors import UserError

if TYPE_CHECKING:
    from qatlaw.landscape import Landscape


def landscape(
    before: Annotated[str, run_argument("Where the cooldown starts: RUN, RUN@STEP or a checkpoint folder.")],
    after: Annotated[str, run_argument("Where it ends: RUN, RUN@STEP or a checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the losses and the figure.")],
    path: Annotated[
        Path | None, typer.Option(help="A run whose checkpoints from BEFORE's step to AFTER's are shown on the plane.")
    ] = None,
    view: Annotated[
        Literal["fp", "quantized"] | None,
        typer.Option(help="One view alone: fp or quantized. [default: both, once AFTER has switched to QAT]"),
    ] = None,
    resolution: Annotated[
        int, typer.Option(min=1, max=1000, help="Grid steps from BEFORE to AFTER, and from y = 0 up.")
    ] = 10,
    across: Annotated[float, typer.Option(help="Largest y, in distances between BEFORE and AFTER.")] = 0.5,
    tokens: Annotated[str, typer.Option(help="Held-out tokens of each loss.")] = "32K",
    data: Annotated[Path | None, typer.Option(help="Prepared data instead of AFTER's own.")] = None,
) -> None:
    """Measure and draw the loss around a cooldown: a valley or a bowl, in full precision and quantized.

    The plane holds the line from BEFORE to AFTER (x) and Adam's step at BEFORE (y, orthogonal to it). On both axes 1 is
    the distance between the two. You can stop the command and start it again: measured points stay.
    """
    from pydantic import TypeAdapter

    from qatlaw.figures.landscape import draw_landscape
    from qatlaw.files import write_figure
    from qatlaw.landscape import SUMMARY, read_landscape
    from qatscale.config.amounts import positive_amount
    from qatscale.files import read_checked, write_json
    from qatscale.study.landscape import measure_landscape, open_scene
    from qatscale.study.plane import Grid

    if not 0 < across < float("inf"):
        raise UserError("--across", across, "must be a number above 0.")
    overrides = [f"evaluation.tokens={positive_amount('--tokens', tokens)}"]
    overrides += [f"data.path={data}"] if data else []
    with working("reading the checkpoints") as status:
        scene = open_scene(before, after, Grid(resolution, across), view, path, overrides)
        measure_landscape(scene, out, _forecast(len(scene.views), status))
    found = read_landscape(out)
    begun = read_checked(out / SUMMARY, TypeAdapter(dict[str, Any]), "--out")
    write_json(out / SUMMARY, {**begun, "summary": found.summary, "findings": found.findings})
    figure = draw_landscape(found)
    for ending in ("png", "svg"):
        write_figure(figure, out / f"landscape.{ending}", dpi=200)
    _print(found, out)


def _forecast(views: int, status: Callable[[str], None]) -> Callable[[int, int], None]:
    """A progress function that prints the cost, once the first point has shown it, and then the time left."""
    from qatscale.train.console import format_duration

    first, begun = 0, 0.0

    def progress(done: int, total: int) -> None:
        nonlocal first, begun
        if not begun:
            first, begun = done, time.monotonic()
            status(f"measuring the first of {plural(total - done, 'point')}")
            return
        each = (time.monotonic() - begun) / (done - first)
        if done == first + 1:
            cost = f"{plural(total - first, 'point')} x {plural(views, 'view')}, {each:.2g} s a point"
            say(f"{cost}: about {format_duration(each * (total - first))}. The same command continues after a stop.")
        text = f"point {done} of {total}, {format_duration(each * (total - done))} left"
        status(text)
        if not console().is_terminal and done * 10 // total > (done - 1) * 10 // total:
            say(text)  # a log has ten lines of progress

    return progress


def _print(found: Landscape, out: Path) -> None:
    from qatlaw.landscape import ENDS

    headers = ("view", "at", "loss", "curvature along", "across", "ratio", "flattest direction")
    table = TextTable(headers, ("view", "at"), "Loss (nats per token) and its second differences", headers[-1:])
    for view, summary in found.summary.items():
        for end in ENDS:
            at = summary[end]
            numbers = (f"{at[key]:.3g}" for key in ("along", "across", "ratio"))
            table.add_row(found.label(view), end, f"{at['loss']:.4f}", *numbers, f"{at['valley_angle']:z.0f}°")
    console().print(table)
    print()
    for sentence in found.findings:
        say(sentence)
    step, unit = found.axes["adam_step"], found.axes["unit"]
    say(
        f"1 on both axes is the distance from BEFORE to AFTER, {unit:.4g}. A step of Adam at BEFORE is {step:.2g} long."
    )
    if found.path is not None:
        furthest = found.path["distance"].max()
        say(f"The path's {plural(len(found.path), 'checkpoint')} lie up to {furthest:.2g} off the plane.")
    say(f"{out}: landscape.png and .svg, grid.csv, landscape.json" + (", path.csv" if found.path is not None else ""))
