"""`qatscale runs`, `compare` and `track-sync`: tables of runs, and their upload to MLflow."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qatlaw.errors import printable
from qatscale.cli.terminal import Json, check_figure, console, run_argument
from qatscale.errors import EXIT_FAILED, UserError


def runs(
    output: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"), as_json: Json = False
) -> None:
    """Print a table of runs."""
    from qatscale.tracking.compare import list_runs, run_folders, runs_table
    from qatscale.tracking.store import where_to_look

    found = run_folders(output)
    if not found:
        raise UserError("output", str(output), "holds no runs.", "Name a folder of runs, or run qatscale quickstart.")
    rows, damaged = list_runs(found)
    if as_json:
        print(json.dumps([asdict(row) for row in rows.values()], indent=2))
    else:
        console().print(runs_table(list(rows.values())))
        for line in where_to_look(rows):
            print(line)
    _say_damaged(damaged)


def _say_damaged(damaged: Iterable[str]) -> None:
    for line in damaged:
        print(printable(f"warning: left out: {line}"), file=sys.stderr)


def compare(
    folders: Annotated[list[Path], run_argument("Folders of runs.")],
    figure: Annotated[Path | None, typer.Option(help="Draw the loss curves into this file (PNG, SVG, PDF).")] = None,
    as_json: Json = False,
) -> None:
    """Print runs side by side: losses in each view, switch, speeds; with --figure their loss curves."""
    from qatscale.tracking import compare as comparison
    from qatscale.tracking.run_folder import RunFolder

    check_figure(figure)
    rows, damaged = comparison.list_runs([RunFolder.open(folder) for folder in folders])
    if as_json:
        print(json.dumps([asdict(row) for row in rows.values()], indent=2))
    elif rows:
        console().print(comparison.comparison_table(list(rows.values())))
    _say_damaged(damaged)
    if not rows:
        raise UserError("runs", ", ".join(map(str, folders)), "none of them can be read.")
    if figure is not None:
        from qatscale.tracking.curves import draw_loss_curves

        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_loss_curves(rows, figure)
        print(f"figure: {figure}", file=sys.stderr)


def track_sync(
    run: Annotated[Path, run_argument("A run's folder.")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow store than the one in the run's recipe.")] = None,
) -> None:
    """Upload to MLflow what an unreachable server missed, or one restored from a backup lost."""
    from qatscale.tracking import mlflow_sync
    from qatscale.tracking.run_folder import RunFolder

    try:
        run_id = mlflow_sync.track_sync(RunFolder.open(run), uri)
    except mlflow_sync.TrackingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    print(f"{run}: MLflow has all of it, as run {run_id}")
