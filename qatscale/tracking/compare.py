"""Runs side by side: `qatscale runs` lists a folder of runs, `qatscale compare` says how some of them ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from qatscale.config.amounts import format_amount
from qatscale.tracking.final import losses_by_view, median_speeds
from qatscale.tracking.run_folder import RunFolder, Status, perplexity

NONE = "–"
_STATUS_STYLES: dict[Status, str] = {
    "done": "green",
    "running": "cyan",
    "running?": "cyan",
    "stopped": "yellow",
    "killed": "red",
    "failed": "red",
}


@dataclass(frozen=True)
class RunRow:
    """One run, as `qatscale runs` lists it."""

    name: str
    scheme: str
    bits: float | None
    """None for scheme fp."""
    qat_fraction: float
    """The part of the steps that runs quantized, after rounding to steps."""
    tokens: int
    """Seen so far, with those of the run it was branched from."""
    tokens_total: int
    step: int
    steps: int
    status: Status
    val_loss: float | None
    """The last one in the scheme's own view: full precision for fp, else quantized."""
    parent: str | None
    """``name@step`` of the run it was branched from, or the folder that an imported one comes from."""


@dataclass(frozen=True)
class ComparisonRow:
    """How one run ended, or how far it came."""

    name: str
    scheme: str
    bits: float | None
    tokens: int
    switch_step: int | None
    losses: dict[str, float]
    """Validation loss by view, all of the same step: `fp`, `quantized`, `ptq2`, ..."""
    tokens_per_second_fp: float | None
    tokens_per_second_qat: float | None

    def perplexity(self, view: str) -> float:
        return perplexity(self.losses[view])


def run_folders(output: Path | str) -> list[RunFolder]:
    """The runs in a folder of run folders, oldest first; empty where it does not exist."""
    found = [RunFolder(file.parent) for file in Path(output).glob("*/run.json")]
    return sorted(found, key=lambda folder: (folder.run["created"], folder.name))


def list_runs(output: Path | str) -> list[RunRow]:
    return [_run_row(folder) for folder in run_folders(output)]


def own_view(folder: RunFolder) -> str:
    """The view a run is judged by: `fp` for scheme fp, else `quantized`."""
    return "fp" if folder.recipe["qat"]["scheme"] == "fp" else "quantized"


def validation_losses(folder: RunFolder) -> dict[str, float]:
    """Loss by view: the final evaluation, or else the last step at which the run was validated."""
    records = folder.records("validation")
    losses = {record["view"]: record["loss"] for record in records if record["step"] == records[-1]["step"]}
    return losses | losses_by_view(folder.final or {}, own_view(folder))


def tokens_per_second(folder: RunFolder) -> tuple[float | None, float | None]:
    """Of the full-precision and of the QAT phase: the final metrics, or else the median of what was logged so far."""
    final = folder.final
    if final is not None:
        return final.get("tokens_per_second_fp"), final.get("tokens_per_second_qat")
    speeds = median_speeds(folder.records("metrics"))
    return speeds["tokens_per_second_fp"], speeds["tokens_per_second_qat"]


def compare(folders: Iterable[RunFolder]) -> list[ComparisonRow]:
    rows = []
    for folder in folders:
        row = _run_row(folder)
        switch = folder.timeline["switch_step"]
        fp, qat = tokens_per_second(folder)
        losses = validation_losses(folder)
        rows.append(ComparisonRow(row.name, row.scheme, row.bits, row.tokens, switch, losses, fp, qat))
    return rows


def runs_table(rows: Sequence[RunRow]) -> Table:
    table = Table()
    table.add_column("run", overflow="fold")
    for header in ("scheme", "status"):
        table.add_column(header)
    for header in ("bits", "QAT", "step", "tokens", "val loss"):
        table.add_column(header, justify="right")
    table.add_column("branched from", overflow="fold")
    for row in rows:
        style = _STATUS_STYLES.get(row.status, "")
        table.add_row(
            row.name,
            row.scheme,
            f"[{style}]{row.status}[/]" if style else row.status,
            _number(row.bits, "g"),
            f"{row.qat_fraction:.1%}",
            f"{row.step:,}/{row.steps:,}",
            f"{format_amount(row.tokens)}/{format_amount(row.tokens_total)}",
            _number(row.val_loss, ".4f"),
            row.parent or NONE,
        )
    return table


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """Validation loss, and perplexity in parentheses, in every view that some run was evaluated in."""
    views = sorted({view for row in rows for view in row.losses}, key=_view_order)
    table = Table(caption="validation loss (perplexity)")
    table.add_column("run", overflow="fold")
    table.add_column("scheme")
    for header in ("bits", "tokens", "switch", *map(view_label, views), "tok/s FP", "tok/s QAT"):
        table.add_column(header, justify="right")
    for row in rows:
        cells = [f"{row.losses[v]:.4f}\n({row.perplexity(v):.4g})" if v in row.losses else NONE for v in views]
        table.add_row(
            row.name,
            row.scheme,
            _number(row.bits, "g"),
            format_amount(row.tokens),
            _number(row.switch_step, ",d"),
            *cells,
            _number(row.tokens_per_second_fp, ",.0f"),
            _number(row.tokens_per_second_qat, ",.0f"),
        )
    return table


def view_label(view: str) -> str:
    """`fp` -> 'full precision', `ptq2` -> 'PTQ 2-bit'."""
    if view.startswith("ptq"):
        return f"PTQ {view.removeprefix('ptq')}-bit"
    return {"fp": "full precision"}.get(view, view)


def _run_row(folder: RunFolder) -> RunRow:
    recipe, timeline, run = folder.recipe, folder.timeline, folder.run
    scheme, steps, switch = recipe["qat"]["scheme"], timeline["steps"], timeline["switch_step"]
    step = max((record["step"] for record in folder.records() if "step" in record), default=0)
    parent, imported = run["parent"], folder.imported
    return RunRow(
        name=run["name"],
        scheme=scheme,
        bits=None if scheme == "fp" else recipe["qat"]["bits"],
        qat_fraction=0.0 if switch is None else (steps - switch) / steps,
        tokens=step * timeline["tokens_per_step"],
        tokens_total=steps * timeline["tokens_per_step"],
        step=step,
        steps=steps,
        status=folder.status,
        val_loss=validation_losses(folder).get(own_view(folder)),
        parent=f"{parent['name']}@{parent['step']}" if parent else imported and Path(imported).name,
    )


def _view_order(view: str) -> tuple[int, float]:
    if view.startswith("ptq"):
        return 2, float(view.removeprefix("ptq"))
    return (0, 0.0) if view == "fp" else (1, 0.0)


def _number(value: float | None, form: str) -> str:
    return NONE if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, form)
