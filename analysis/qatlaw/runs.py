"""From the records of finished runs to a table to fit on: what is used, what is left out and why.

A record is what tracking keeps of a run: its final numbers by their stable names (`final/val_loss`, `n_params`, `bits`,
`tokens_fp`, `tokens_qat`, `scheme`) and its recipe as flat text. `qatlaw.mlflow_runs` reads them from MLflow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qatlaw.errors import LawError
from qatlaw.table import COLUMNS, RunTable

LOSS, PTQ_LOSS = "final/val_loss", "final/val_loss_ptq"
NEEDED = ("n_params", "bits", "tokens_fp", "tokens_qat", "scheme", LOSS)
LARGEST = 1e300
"""MLflow's SQL stores keep an infinite number as the largest float."""
SAME_IN_ALL = (
    "data.path", "data.sequence_length", "model.vocab_size", "schedule.shape", "schedule.cooldown_fraction",
    "schedule.cooldown_tokens", "qat.group_size", "qat.embedding_bits", "qat.cooldown_fraction", "qat.optimizer_state",
)  # fmt: skip
"""Settings that no law here knows: runs that differ in them are comparable only if that does not matter."""


@dataclass(frozen=True)
class RunRecord:
    """One run, as tracking tells it."""

    run_id: str
    name: str
    status: str
    """FINISHED, or MLflow's word for anything else."""
    final: Mapping[str, Any]
    """Numbers and `scheme` by their stable names; what is not known is missing."""
    recipe: Mapping[str, str]
    """Dotted key to text, as MLflow's parameters have it."""
    created: float = 0.0
    """Any clock: of two records of the same run the later one counts."""
    kind: str = "training"
    """`training`; `fit` for the record of a fitted law; `imported` for a model that was trained elsewhere."""


@dataclass(frozen=True)
class LeftOut:
    name: str
    reason: str


@dataclass(frozen=True)
class Collected:
    """Runs to fit on."""

    table: RunTable
    left_out: tuple[LeftOut, ...]
    notices: tuple[str, ...]
    """What a reader has to know about the runs that were used."""


def collect(records: Iterable[RunRecord], source: str) -> Collected:
    """The table of the runs that ended soundly, with one row for each post-training quantization of an `fp` run.

    LawError where none is left.
    """
    training = [record for record in records if record.kind != "fit"]
    left_out, sound = [], []
    for record in training:
        reason = _unfit(record)
        if reason:
            left_out.append(LeftOut(record.name, reason))
        else:
            sound.append(record)
    used, again = _once_each(sound)
    left_out += again
    if not used:
        told = "; ".join(f"{count} {reason}" for reason, count in counted(left_out).items()) or "it holds none"
        raise LawError("runs", source, f"no finished run to fit on: {told}.", "Train some, or name another source.")
    rows = [row for record in used for row in _rows(record)]
    return Collected(RunTable.from_frame(pd.DataFrame(rows), source), tuple(left_out), _notices(used))


def counted(left_out: Sequence[LeftOut]) -> dict[str, int]:
    """Reason to number of runs, most first; what differs from run to run (after a colon) left away."""
    counts: dict[str, int] = {}
    for one in left_out:
        reason = one.reason.partition(":")[0]
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _unfit(record: RunRecord) -> str | None:
    """Why a run is no point of a law; None if it is one."""
    if record.kind == "imported":
        return "imported, not trained"
    if record.status != "FINISHED":
        return f"unfinished: {record.status.lower()}"
    missing = [name for name in NEEDED if record.final.get(name) is None]
    if missing:
        return f"final metrics missing: {', '.join(missing)}"
    loss = float(record.final[LOSS])
    if not math.isfinite(loss) or abs(loss) > LARGEST:
        return "diverged: its loss is not finite"
    vocabulary = _number(record.recipe.get("model.vocab_size"))
    if vocabulary and loss > math.log(vocabulary):
        return f"diverged: its loss of {loss:.3g} is above ln({vocabulary:.0f}) = {math.log(vocabulary):.3g}, guessing"
    if any(_number(record.recipe.get(key)) == 0 for key in _cooldowns(record)):
        return "without a cooldown: a trunk, whose loss at the stable rate compares with no run's end"
    return None


def _cooldowns(record: RunRecord) -> list[str]:
    keys = ["schedule.cooldown_fraction", "schedule.cooldown_tokens"]
    return [*keys, "qat.cooldown_fraction"] if record.final["scheme"] == "sequential" else keys


def _once_each(records: Sequence[RunRecord]) -> tuple[list[RunRecord], list[LeftOut]]:
    """One record for each setting that a law knows, and seed: of the same run the latest, of a sweep the best.

    Runs that differ in nothing but, say, the learning rate are trials of one point; a law is about the best of them.
    """
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in records:
        key = tuple(record.final[name] for name in NEEDED[:-1])
        groups.setdefault((*key, _seed(record)), []).append(record)
    used, left_out = [], []
    for group in groups.values():
        latest: dict[str, RunRecord] = {}
        for record in sorted(group, key=lambda record: record.created):
            recipe = json.dumps({k: v for k, v in record.recipe.items() if k not in ("name", "output")}, sort_keys=True)
            if recipe in latest:
                left_out.append(LeftOut(latest[recipe].name, f"trained again: as {record.name}, which is later"))
            latest[recipe] = record
        best = min(latest.values(), key=lambda record: float(record.final[LOSS]))
        used.append(best)
        for record in latest.values():
            if record is not best:
                reason = f"a trial with a higher loss: {_difference(record, best)}; the best is {best.name}"
                left_out.append(LeftOut(record.name, reason))
    return used, left_out


def _difference(record: RunRecord, best: RunRecord) -> str:
    keys = [key for key in record.recipe if key not in ("name", "output", "n_params")]
    differing = [key for key in keys if record.recipe[key] != best.recipe.get(key)]
    return ", ".join(f"{key}={record.recipe[key]}" for key in differing[:3]) or "another recipe"


def _rows(record: RunRecord) -> list[dict[str, Any]]:
    final = record.final
    own = {name: final[name] for name in NEEDED[:-1]}
    shared = {"name": record.name, "seed": _seed(record)}
    rows = [{**own, "loss": float(final[LOSS]), "run_id": record.run_id, **shared}]
    if own["scheme"] == "fp":
        for name, loss in final.items():
            if name.startswith(PTQ_LOSS) and loss is not None and math.isfinite(loss) and abs(loss) < LARGEST:
                bits = float(name.removeprefix(PTQ_LOSS))
                ptq = {"bits": bits, "scheme": "ptq", "loss": float(loss), "run_id": f"{record.run_id}/ptq{bits:g}"}
                rows.append({**own, **ptq, **shared})
    assert all(name in rows[0] for name in COLUMNS)
    return rows


def _seed(record: RunRecord) -> str:
    """Of weights and data: two runs with another of either are repeats, not the same run."""
    return f"{record.recipe.get('seed', '0')}/{record.recipe.get('data.seed', '0')}"


def _notices(records: Sequence[RunRecord]) -> tuple[str, ...]:
    notices = []
    for key in SAME_IN_ALL:
        values = {record.recipe[key] for record in records if key in record.recipe}
        if len(values) > 1:
            shown = ", ".join(sorted(values)[:4]) + (", …" if len(values) > 4 else "")
            notices.append(f"the runs differ in {key} ({shown}), which the law does not know")
    return tuple(notices)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
