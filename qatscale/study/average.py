"""Averages of checkpoints: of branches that differ in their data alone, and of a window of one stable phase.

Weights are averaged as they are. The scale of a quantized row is positive and acts as a factor, so scales are averaged
in log space: the geometric mean of what forward uses, max(scale, SCALE_FLOOR). Codes have no mean that is a code. The
`ptq` view has the loss with scales that are calibrated anew on the averaged weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qatlaw.cooldown import branches_of
from qatlaw.names import AVERAGED, FIRST_STEP, VAL_LOSS, VAL_LOSS_FP
from qatlaw.results import read_results
from qatlaw.runs import RunRecord
from qatlaw.study import trained_by
from qatscale.config.recipe import config_differences
from qatscale.engine.checkpoints.folders import step_folders, step_of
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.engine.checkpoints.training_state import UNKNOWN_DATA, TrainingState, read_checkpoint
from qatscale.errors import UserError
from qatscale.new_folder import check_new
from qatscale.quant.bit_widths import SCALE_FLOOR
from qatscale.study.folder import StudyFolder
from qatscale.study.lay_out import record_rows
from qatscale.tracking.compare import final_losses
from qatscale.tracking.convert import write_run
from qatscale.train.evaluate import evaluate_checkpoint

_WINDOW = re.compile(r"(?P<run>.+)@(?P<first>\d+)-(?P<last>\d+)")
WINDOWS = (2, 5, 10, 20)
"""Checkpoints in the averages over the end of a run without a cooldown; the longest has all."""


def average(sources: Sequence[str], out: Path) -> TrainingState:
    """Average checkpoints, named as `find_checkpoint` takes them or RUN@FIRST-LAST for all in a range of steps.

    `out` becomes a run's folder with one checkpoint, to evaluate, export or branch from. Its recipe is that of the
    checkpoint with the most steps. UserError where fewer than two are named, where their models, bits or tokenizers
    differ, and where some have switched to QAT and others have not.
    """
    check_new(out)
    state = averaged([checkpoint for source in sources for checkpoint in checkpoints_of(source)])
    write_run(state, out)
    return state


def checkpoints_of(source: str) -> list[Path]:
    """The checkpoints that a source names, by step."""
    window = _WINDOW.fullmatch(source)
    if window is None or Path(source).exists():
        return [find_checkpoint(source)]
    first, last = int(window["first"]), int(window["last"])
    steps = {step_of(path): path for path in step_folders(Path(window["run"]) / "checkpoints")}
    found = [path for step, path in steps.items() if first <= step <= last]
    if not found:
        held = f"it has steps {', '.join(map(str, steps))}" if steps else "the run has no checkpoint"
        raise UserError("checkpoint", source, f"no checkpoint from step {first} to {last}; {held}.")
    return found


def averaged(checkpoints: Sequence[Path]) -> TrainingState:
    """The state whose weights are the mean of these, one parameter in memory at a time."""
    if len({path.resolve() for path in checkpoints}) < max(2, len(checkpoints)):
        twice = len(checkpoints) > 1
        problem = "a checkpoint is named twice." if twice else "an average takes two checkpoints or more."
        raise UserError(
            "checkpoint", ", ".join(map(str, checkpoints)), problem, "Name different ones, or RUN@FIRST-LAST."
        )
    states = [read_checkpoint(str(path)) for path in checkpoints]
    latest = max(states, key=lambda state: state.step)
    for state in states:
        _check_alike(latest, state)
    quantized = latest.plugin["switched_at"] is not None

    def read(kind: str, name: str) -> Tensor:
        assert kind == "weight", "an average has no moments"
        if not name.endswith(".weight_scale"):
            return mean(state.read(kind, name) for state in states).float()
        if not quantized:
            return latest.read(kind, name)
        return geometric_mean(state.read(kind, name) for state in states).float()

    tokens = {state.data for state in states}
    return replace(
        latest,
        source=f"average of {len(states)} checkpoints: {', '.join(state.source for state in states)}",
        data=latest.data if len(tokens) == 1 else UNKNOWN_DATA,
        adam_steps=dict.fromkeys(latest.shapes, 0),
        read=read,
    )


def mean(values: Iterable[Tensor]) -> Tensor:
    """Elementwise, in float64, one at a time."""
    total, count = Tensor(), 0
    for value in values:
        total, count = value.double() if count == 0 else total.add_(value), count + 1
    return total.div_(count)


def geometric_mean(scales: Iterable[Tensor]) -> Tensor:
    """Elementwise, in float64, of what forward makes of learned scales."""
    return mean(scale.double().clamp(min=SCALE_FLOOR).log() for scale in scales).exp_()


def _check_alike(first: TrainingState, other: TrainingState) -> None:
    """UserError where the average of two states means nothing."""
    for difference in config_differences(first.config, other.config):
        if difference.key.startswith("model."):
            problem = f"{other.source} has {difference.new!r}, and {first.source} {difference.old!r}."
            raise UserError(difference.key, None, problem, "Average checkpoints of one model.")
    if first.tokenizer and other.tokenizer and first.tokenizer != other.tokenizer:
        raise UserError("checkpoint", other.source, f"its tokenizer is not that of {first.source}.")
    switched = [state.plugin["switched_at"] is not None for state in (first, other)]
    if switched[0] != switched[1]:
        before, after = (first, other) if switched[1] else (other, first)
        problem = f"it has not switched to QAT, and {after.source} has."
        raise UserError("checkpoint", before.source, problem, "Average checkpoints of one phase.")
    if all(switched) and any(first.plugin[key] != other.plugin[key] for key in ("bits", "group_size")):
        raise UserError("checkpoint", other.source, f"its bits or groups are not those of {first.source}.")


# --- the averages of a study ---


def average_study(folder: StudyFolder, progress: Callable[[str], None] = print) -> int:
    """Average and evaluate what a study's finished runs offer, and add a row each to results.csv; how many are new.

    Averaged are the final checkpoints of runs that differ in the cooldown's data alone, and the last checkpoints of
    each run without a cooldown. An average that has its row is not made again.
    """
    records = {record.name: record for record in read_results(folder.results)} if folder.results.exists() else {}
    wanted = {f"{names[0]}-mean{len(names)}": finals for names, finals in _branches(folder, records)}
    wanted |= {f"{name}-last{len(window)}": window for name, window in _windows(folder, records)}
    missing = {name: found for name, found in wanted.items() if name not in records}
    for number, (name, checkpoints) in enumerate(missing.items(), 1):
        progress(f"{number} of {len(missing)}: {name}")
        record_rows(folder, [_evaluated(folder, name, checkpoints, records[name.rpartition("-")[0]])])
    return len(missing)


def _branches(folder: StudyFolder, records: dict[str, RunRecord]) -> list[tuple[list[str], list[Path]]]:
    """By group of runs that differ in the cooldown's data alone: their names and final checkpoints."""
    found = []
    for group in branches_of(list(records.values())):
        names = [record.name for record in group if record.name in folder.jobs]
        finals = [folder.checkpoint(name, folder.jobs[name].steps) for name in names]
        if len(names) > 1 and all(path.is_dir() for path in finals):
            found.append((names, finals))
    return found


def _windows(folder: StudyFolder, records: dict[str, RunRecord]) -> list[tuple[str, list[Path]]]:
    """The last checkpoints of each run without a cooldown, its trunk's included, as many as WINDOWS say."""
    begins = {job.name: (job.parent, job.start) for job in folder.jobs.values()}
    found = []
    for name, job in folder.jobs.items():
        if name not in records or (timeline := folder.run(name).timeline)["segments"][-1]["shape"] is not None:
            continue
        stable = timeline["segments"][-1]["start"]
        holders = {trained_by(begins, name, step) for step in range(stable + 1, job.steps + 1)}
        paths = {
            step_of(path): path for holder in holders for path in step_folders(folder.run(holder).checkpoints)
            if step_of(path) > stable and trained_by(begins, name, step_of(path)) == holder
        }  # fmt: skip
        last = [path for _, path in sorted(paths.items())]
        lengths = {length for length in WINDOWS if length < len(last)} | {len(last)}
        found += [(name, last[-length:]) for length in sorted(lengths - {0, 1})]
    return found


def _evaluated(folder: StudyFolder, name: str, checkpoints: list[Path], run: RunRecord) -> RunRecord:
    """The row of an average: that of its run, with losses in the run's own view, in full precision and recalibrated."""
    out = folder.path / "averages" / name
    if not out.exists():
        write_run(averaged(checkpoints), out)
    scheme, bits = run.final["scheme"], run.final["bits"]
    widths = [float(key.rpartition("ptq")[2]) for key in run.final if "ptq" in key] if scheme == "fp" else [float(bits)]
    _, _, losses = evaluate_checkpoint(str(out), widths)
    kept: dict[str, Any] = {key: value for key, value in run.final.items() if not key.startswith("final/")}
    own = final_losses(losses, scheme)
    assert {VAL_LOSS, VAL_LOSS_FP} <= own.keys()
    final = {**kept, **own, AVERAGED: len(checkpoints), FIRST_STEP: step_of(checkpoints[0])}
    return RunRecord(name, name, "FINISHED", final, run.recipe)
