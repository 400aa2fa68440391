"""Rows and tables of runs: `qatscale runs` and `qatscale compare`."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlaw.names import VAL_LOSS, VAL_LOSS_FP, VAL_LOSS_PTQ
from qatlaw.text_table import TextTable
from qatscale.config.amounts import format_amount
from qatscale.errors import InputError, first_line
from qatscale.tracking.run_folder import RunFolder, Status, perplexity

NONE = "–"
LEAST_STEPS = 50
"""Fewest steps for a median speed."""
_STATUS_STYLES: dict[str, str] = {
    "done": "green",
    "running": "cyan",
    "running?": "cyan",
    "stopped": "yellow",
    "killed": "red",
    "failed": "red",
}


@dataclass(frozen=True)
class RunRow:
    """How one run ended, or how far it came."""

    name: str
    scheme: str
    bits: float | None
    """None for scheme fp."""
    qat_fraction: float
    """Share of the steps that run quantized, after rounding to steps."""
    switch_step: int | None
    tokens: int
    """Tokens seen so far, including those before the branch."""
    tokens_total: int
    step: int
    steps: int
    status: Status
    losses: dict[str, float]
    """Validation loss by view, all at the same step: `fp`, `quantized`, `ptq2`, ..."""
    val_loss: float | None
    """The loss in the scheme's own view: full precision for fp, else quantized."""
    tokens_per_second_fp: float | None
    tokens_per_second_qat: float | None
    parent: str | None
    """``name@step`` of the run it was branched from, or the origin of an imported one."""


def own_view(scheme: str) -> str:
    """The view that a run is judged by: `fp` for scheme fp, else `quantized`."""
    return "fp" if scheme == "fp" else "quantized"


def final_losses(losses: Mapping[str, float], scheme: str) -> dict[str, float]:
    """Loss by view (`fp`, `quantized`, `ptq4` …) → loss by stable name.

    Empty for a run whose data hold nothing out.
    """
    if not losses:
        return {}
    by_bits = {f"{VAL_LOSS_PTQ}{v.removeprefix('ptq')}": loss for v, loss in losses.items() if v.startswith("ptq")}
    return {VAL_LOSS: losses[own_view(scheme)], VAL_LOSS_FP: losses["fp"], **by_bits}


def losses_by_view(final: Mapping[str, Any], scheme: str) -> dict[str, float]:
    """The inverse of `final_losses`, from all final metrics of a run."""
    views = {VAL_LOSS: own_view(scheme), VAL_LOSS_FP: "fp"}
    views |= {name: f"ptq{name.removeprefix(VAL_LOSS_PTQ)}" for name in final if name.startswith(VAL_LOSS_PTQ)}
    return {view: final[name] for name, view in views.items() if final.get(name) is not None}


def median_speeds(records: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """Median tokens/s of the full-precision and the QAT steps, from a run's metrics events in order.

    An interval counts as often as it has steps, unless it holds warm-up steps. Evaluation and checkpoints are in none.
    None for fewer than LEAST_STEPS steps.
    """
    speeds: dict[str, list[tuple[float, int]]] = {"fp": [], "qat": []}
    before, kinds = 0, set()
    for record in records:
        kind = "qat" if record["phase"].startswith("qat_") else "fp"
        if not record.get("warmup", kind not in kinds):  # older runs lack the mark: each kind's first one
            speeds[kind].append((record["tokens_per_second"], record["step"] - before))
        kinds.add(kind)
        before = record["step"]
    return {f"tokens_per_second_{kind}": _median(values) for kind, values in speeds.items()}


def _median(speeds: list[tuple[float, int]]) -> float | None:
    """The median speed of a step, from (speed, steps)."""
    speeds = sorted(speed for speed in speeds if speed[1] > 0)
    ends = list(itertools.accumulate(steps for _, steps in speeds))
    if not ends or ends[-1] < LEAST_STEPS:
        return None
    low, high = (speeds[bisect.bisect_right(ends, middle)][0] for middle in ((ends[-1] - 1) // 2, ends[-1] // 2))
    return (low + high) / 2


def run_folders(output: Path | str) -> list[RunFolder]:
    """The runs in a folder of run folders, oldest first; empty if the folder does not exist."""
    found = [RunFolder(file.parent) for file in Path(output).glob("*/run.json")]

    def age(folder: RunFolder) -> tuple[float, str]:
        try:
            return float(folder.run["created"]), folder.name
        except InputError:  # damaged: reported by the reader
            return math.inf, folder.name

    return sorted(found, key=age)


def list_runs(folders: Iterable[RunFolder]) -> tuple[dict[RunFolder, RunRow], list[str]]:
    """A row of each run that can be read, and a sentence about each one that cannot."""
    rows, damaged = {}, []
    for folder in folders:
        try:
            rows[folder] = run_row(folder)
        except InputError as error:
            damaged.append(f"{error.value} {error.problem}")
        except OSError as error:
            damaged.append(f"{error.filename} cannot be read: {error.strerror}.")
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # valid JSON or YAML of another shape
            damaged.append(f"{folder.path}: its files are damaged ({first_line(error)}).")
    return rows, damaged


def validation_losses(folder: RunFolder) -> dict[str, float]:
    """Loss by view, of the final evaluation or else of the last validation."""
    records = folder.records("validation")
    losses = {record["view"]: record["loss"] for record in records if record["step"] == records[-1]["step"]}
    losses |= losses_by_view(folder.final or {}, folder.scheme)
    return {view: float(loss) for view, loss in losses.items()}


def tokens_per_second(folder: RunFolder) -> tuple[float | None, float | None]:
    """Speeds of the full-precision and of the QAT phase, from the final metrics or else from the records so far."""
    speeds = folder.final or median_speeds(folder.records("metrics"))
    found = (speeds.get(f"tokens_per_second_{kind}") for kind in ("fp", "qat"))
    fp, qat = (None if speed is None else float(speed) for speed in found)  # of a damaged file: ValueError
    return fp, qat


def run_row(folder: RunFolder) -> RunRow:
    recipe, timeline, run = folder.recipe, folder.timeline, folder.run
    scheme, switch = folder.scheme, timeline["switch_step"]
    steps, per_step = int(timeline["steps"]), int(timeline["tokens_per_step"])
    step = max((int(record["step"]) for record in folder.records() if "step" in record), default=0)
    losses = validation_losses(folder)
    speeds = tokens_per_second(folder)
    parent, imported = run["parent"], folder.imported
    return RunRow(
        name=run["name"], scheme=scheme, bits=None if scheme == "fp" else recipe["qat"]["bits"],
        qat_fraction=0.0 if switch is None else (steps - switch) / steps, switch_step=switch, tokens=step * per_step,
        tokens_total=steps * per_step, step=step, steps=steps, status=folder.status, losses=losses,
        val_loss=losses.get(own_view(scheme)), tokens_per_second_fp=speeds[0], tokens_per_second_qat=speeds[1],
        parent=f"{parent['name']}@{parent['step']}" if parent else imported and Path(imported).name,
    )  # fmt: skip


def runs_table(rows: Sequence[RunRow]) -> TextTable:
    table = TextTable(
        ("run", "scheme", "status", "bits", "QAT", "step", "tokens", "val loss", "branched from"),
        words=("run", "scheme", "status", "branched from"),
        drop=("branched from", "tokens", "QAT", "scheme"),
        styles=_STATUS_STYLES,
    )
    for row in rows:
        table.add_row(
            row.name,
            row.scheme,
            row.status,
            _number(row.bits, "g"),
            f"{row.qat_fraction:.1%}",
            f"{row.step:,}/{row.steps:,}",
            f"{format_amount(row.tokens)}/{format_amount(row.tokens_total)}",
            _number(row.val_loss, ".4f"),
            row.parent or NONE,
        )
    return table


def comparison_table(rows: Sequence[RunRow]) -> TextTable:
    """Validation loss, and perplexity in parentheses, in every view in which a run was evaluated."""
    views = sorted({view for row in rows for view in row.losses}, key=_view_order)
    table = TextTable(
        ("run", "scheme", "bits", "tokens", "switch", *map(view_label, views), "tok/s FP", "tok/s QAT"),
        words=("run", "scheme"),
        drop=("tok/s FP", "tok/s QAT", "switch", "tokens", "scheme", "bits"),
        caption=f"Validation loss (perplexity). Speeds are medians of at least {LEAST_STEPS} steps.",
    )
    for row in rows:
        losses = row.losses
        table.add_row(
            row.name,
            row.scheme,
            _number(row.bits, "g"),
            format_amount(row.tokens),
            _number(row.switch_step, ",d"),
            *(f"{losses[v]:.4f}\n({perplexity(losses[v]):.4g})" if v in losses else NONE for v in views),
            _number(row.tokens_per_second_fp, ",.0f"),
            _number(row.tokens_per_second_qat, ",.0f"),
        )
    return table


def view_label(view: str) -> str:
    """`fp` -> 'full precision', `ptq2` -> 'PTQ 2-bit'."""
    if view.startswith("ptq"):
        return f"PTQ {view.removeprefix('ptq')}-bit"
    return {"fp": "full precision"}.get(view, view)


def _view_order(view: str) -> tuple[int, float]:
    """Full precision, quantized, then PTQ by bits."""
    if view.startswith("ptq"):
        return 2, float(view.removeprefix("ptq"))
    return (0, 0.0) if view == "fp" else (1, 0.0)


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
