"""What finished runs have to show."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qatscale.cli.terminal import check_figure, console, plain_table
from qatscale.errors import EXIT_FAILED, UserError
from qatscale.tracking.run_folder import RunFolder


def print_evaluation(
    checkpoint: str, ptq: Sequence[float], data: Path | None, tokens: str | None, as_json: bool
) -> None:
    from qatscale.cli.show import check_bits
    from qatscale.config.amounts import positive_amount
    from qatscale.tracking.compare import view_label
    from qatscale.tracking.run_folder import perplexity
    from qatscale.train.evaluate import evaluate_checkpoint

    for bits in ptq:
        check_bits("--ptq", bits)
    limit = None if tokens is None else positive_amount("--tokens", tokens)
    found, counted, losses = evaluate_checkpoint(checkpoint, ptq, data, limit)
    if as_json:
        views = {view: {"loss": loss, "perplexity": perplexity(loss)} for view, loss in losses.items()}
        print(json.dumps({"checkpoint": str(found), "tokens": counted, "views": views}, indent=2))
        return
    numbers = ("validation loss", "perplexity")
    table = plain_table("view", *numbers, right=numbers, title=f"{found}: {counted:,} held-out tokens")
    for view, loss in losses.items():
        table.add_row(view_label(view), f"{loss:.4f}", f"{perplexity(loss):.4g}")
    console().print(table)


def print_runs(output: Path, as_json: bool) -> None:
    from qatscale.tracking.compare import list_runs, runs_table

    rows = list_runs(output)
    if not rows:
        do = (
            "Its parent folder is what lists runs."
            if (output / "run.json").exists()
            else "Name a folder of run folders."
        )
        raise UserError("output", str(output), "holds no runs.", do)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        console().print(runs_table(rows))


def print_comparison(folders: Sequence[Path], figure: Path | None, as_json: bool) -> None:
    from qatscale.tracking.compare import comparison_table, run_row

    check_figure(figure)
    runs = [RunFolder.open(folder) for folder in folders]
    rows = [run_row(run) for run in runs]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        console().print(comparison_table(rows))
    if figure is not None:
        from qatscale.tracking.curves import draw_loss_curves

        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_loss_curves(runs, figure)
        print(f"figure: {figure}", file=sys.stderr)


def run_sync(run: Path, uri: str | None) -> None:
    from qatscale.tracking.mlflow_sync import TrackingError, track_sync

    try:
        run_id = track_sync(RunFolder.open(run), uri)
    except TrackingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    print(f"{run}: MLflow has all of it, as run {run_id}")
