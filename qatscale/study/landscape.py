"""The loss around a cooldown, measured: a plane through two checkpoints and an Adam step, and a run's path on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from qatlaw.files import write_atomic
from qatlaw.landscape import GRID, PATH, SUMMARY
from qatscale.config.schema import RunConfig
from qatscale.data.open import open_validation
from qatscale.data.reader import EvaluationReader
from qatscale.engine.checkpoints.folders import step_folders, step_of
from qatscale.engine.checkpoints.reader import CheckpointReader, open_checkpoint
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.engine.runtime import uses_gpu
from qatscale.errors import UserError
from qatscale.files import only_process, read_checked, write_json
from qatscale.model.lazy_state import LazyState, State
from qatscale.quant.bit_widths import SCALE_FLOOR
from qatscale.quant.plugin import matrices
from qatscale.quant.scales import initial_scale
from qatscale.schedule.build import build_timeline
from qatscale.schedule.timeline import StepSettings
from qatscale.study.plane import Grid, Plane, measure
from qatscale.train.validation import open_view, summed_loss

VIEWS = ("fp", "quantized")
Progress = Callable[[int, int], None]
"""Called with the points done and their number."""


@dataclass(frozen=True)
class Scene:
    """What is measured."""

    before: CheckpointReader
    after: CheckpointReader
    before_config: RunConfig
    config: RunConfig
    """The recipe of after, with the data and the tokens to measure on."""
    views: tuple[str, ...]
    grid: Grid
    path: tuple[CheckpointReader, ...] = ()
    """Further checkpoints to project, oldest first."""


def open_scene(
    before: str, after: str, grid: Grid, view: str | None = None, path: Path | None = None,
    overrides: Sequence[str] = (),
) -> Scene:  # fmt: skip
    """Checkpoints as `find_checkpoint` takes them; path: a run. view: None: every view that after has.

    overrides: of the data and the tokens to measure on. UserError where the checkpoints do not go together.
    """
    before_config, first = open_checkpoint(before)
    config, last = open_checkpoint(after, overrides)
    switched = last.manifest.switched_at is not None
    if view == "quantized" and not switched:
        raise UserError("--view", view, f"{last.folder} has not switched to QAT.", "Leave it out.")
    views = (view,) if view else VIEWS if switched else VIEWS[:1]
    between = _between(path, first.manifest.step, last.manifest.step) if path else ()
    for option, one in (("BEFORE", first), *(("--path", one) for one in between)):
        _check_alike(option, one, last, "quantized" in views)
    return Scene(first, last, before_config, config, views, grid, between)


def _between(run: Path, first: int, last: int) -> tuple[CheckpointReader, ...]:
    """The checkpoints of a run after the step of before, up to that of after."""
    between = [folder for folder in step_folders(run / "checkpoints") if first < step_of(folder) <= last]
    if not between:
        problem = f"has no checkpoint after step {first} and up to {last}."
        raise UserError("--path", str(run), problem, "Train it with checkpoint.interval and checkpoint.keep.")
    return tuple(open_checkpoint(str(folder))[1] for folder in between)


def _shapes(reader: CheckpointReader) -> dict[str, list[int]]:
    return {n: record.shape for n, record in reader.manifest.parameters.items() if not n.endswith(".weight_scale")}


def _check_alike(option: str, one: CheckpointReader, other: CheckpointReader, quantized: bool) -> None:
    """UserError for weights of another model and, if the quantized view is asked for, scales of another kind."""
    ours, theirs = _shapes(one), _shapes(other)
    if differ := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
        raise UserError(option, str(one.folder), f"is another model than {other.folder} ({differ[0]} differs).")
    if quantized and one.manifest.switched_at is not None:
        for key in ("bits", "group_size"):
            if one.manifest.plugin[key] != other.manifest.plugin[key]:
                problem = f"has scales of other {key} than {other.folder}."
                raise UserError(option, str(one.folder), problem, "Add --view fp.")


# --- states ---


class Probe:
    """The model of after, in which the weights and scales of any point are put."""

    def __init__(self, scene: Scene, held_out: EvaluationReader) -> None:
        self._held_out, self._views = held_out, scene.views
        self._device = torch.device("cuda" if uses_gpu() else "cpu")
        self._model, _ = load_checkpointed_model(scene.after, scene.config, self._device)
        self._parameters = dict(self._model.named_parameters())
        self._shapes = {name: tuple(shape) for name, shape in _shapes(scene.after).items()}

    def state(self, read: Callable[[str], Tensor]) -> State:
        """The weights, each read when it is asked for."""
        return LazyState(self._shapes, lambda name: read(name).to(self._device))

    @torch.no_grad()
    def scales(self, reader: CheckpointReader) -> dict[str, Tensor]:
        """A checkpoint's scales; before the switch those that it would set there. Empty without a quantized view."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        found = {}
        for _, layer in matrices(self._model) if "quantized" in self._views else ():
            name = names[id(layer.weight_scale)]
            if reader.manifest.switched_at is None:
                weight = reader.parameter(names[id(layer.weight)])
                scale = initial_scale(layer.quantizer, weight, layer.group_size, layer.weight_scale.dtype)
            else:
                scale = reader.parameter(name)
            found[name] = scale.to(self._device).clamp_min(SCALE_FLOOR)  # forward uses no smaller one
        return found

    @torch.no_grad()
    def losses(self, weights: State, scales: Mapping[str, Tensor]) -> list[float]:
        for state in (weights, scales):
            for name, value in state.items():
                self._parameters[name].copy_(value)
        found = []
        for view in self._views:
            with open_view(self._model, view):
                total, count = summed_loss(self._model, self._held_out, self._device, 0, 1)
            found.append(total / count)
        return found


def adam_step(config: RunConfig, reader: CheckpointReader) -> Callable[[str], Tensor]:
    """Adam's last update before a checkpoint, from its moments: −m̂/(√v̂ + ε), without rate and weight decay."""
    betas = _last_settings(config, reader).betas

    def read(name: str) -> Tensor:
        steps = reader.manifest.parameters[name].adam_steps
        if steps == 0:
            problem = f"Adam has no moments there ({name}), and they give the second axis."
            raise UserError("BEFORE", str(reader.folder), problem, "Give a checkpoint that was trained.")
        mean, square = (
            reader.parameter(name, kind) / (1 - beta**steps)
            for kind, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True)
        )
        return -mean / (square.sqrt() + config.optimizer.eps)

    return read


def _last_settings(config: RunConfig, reader: CheckpointReader) -> StepSettings:
    timeline = build_timeline(config)
    return timeline.at(min(max(reader.manifest.step, 1), timeline.steps) - 1)


def between_scales(first: Mapping[str, Tensor], last: Mapping[str, Tensor], x: float) -> State:
    """Scales at x, interpolated in the logarithm.

    Both ends of the line so have the losses of their checkpoints, and beyond them no scale is negative. Along a row the
    levels are fixed, as for an optimizer step, which hardly moves them. Recalibrated scales would show another model at
    after, for the trained ones are not those of the least squared error.
    """
    return {name: first[name] * (last[name] / first[name]) ** x for name in first}


# --- measuring ---


def measure_landscape(scene: Scene, out: Path, progress: Progress) -> None:
    """Write grid.csv, path.csv and landscape.json into `out`; a former call's points are not repeated.

    UserError where `out` holds a landscape of other inputs, or another process is at it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with only_process(out, "--out"):
        _measure(scene, out, progress)


def _measure(scene: Scene, out: Path, progress: Progress) -> None:
    held_out = open_validation(scene.config, scene.after.manifest.tokenizer)
    inputs = _inputs(scene, held_out)
    _check_same(out, inputs)
    probe = Probe(scene, held_out)
    before = probe.state(scene.before.parameter)
    step = probe.state(adam_step(scene.before_config, scene.before))
    plane = Plane.through(before, probe.state(scene.after.parameter), step)
    rate = _last_settings(scene.before_config, scene.before).learning_rate
    axes = {
        "x": "along the line from before (0) to after (1)",
        "y": "across it: the part of Adam's last step at before that is orthogonal to the line",
        "unit": plane.norm,
        "adam_step": rate * plane.step_norm / plane.norm,
        "adam_cosine": plane.cosine,
    }
    write_json(out / SUMMARY, {"inputs": inputs, "axes": axes})
    first, last = probe.scales(scene.before), probe.scales(scene.after)

    def losses(weights: State, x: float) -> list[float]:
        return probe.losses(weights, between_scales(first, last, x))

    count = len(scene.grid.points)
    total = count + len(scene.path)
    measure(plane, scene.grid, losses, scene.views, out / GRID, lambda done: progress(done, total))
    rows = []
    for index, reader in enumerate(scene.path, 1):
        weights = probe.state(reader.parameter)
        rows.append((reader.manifest.step, *plane.project(weights), *probe.losses(weights, probe.scales(reader))))
        progress(count + index, total)
    if rows:
        frame = pd.DataFrame(rows, columns=["step", "x", "y", "distance", *scene.views])
        write_atomic(out / PATH, frame.to_csv(index=False).encode())


def _inputs(scene: Scene, held_out: EvaluationReader) -> dict[str, Any]:
    """What decides the grid's losses."""
    named = {"before": scene.before, "after": scene.after}
    return {
        **{name: str(reader.folder) for name, reader in named.items()},
        **{f"{name}_checksum": reader.manifest.digest() for name, reader in named.items()},
        "views": list(scene.views),
        "bits": scene.config.qat.bits if "quantized" in scene.views else None,
        "resolution": scene.grid.resolution,
        "across": scene.grid.across,
        "points": len(scene.grid.points),
        "tokens": held_out.tokens,
        "data": held_out.stream.manifest.fingerprint_of("validation"),
        "device": "cuda" if uses_gpu() else "cpu",
    }


class _Summary(TypedDict):
    inputs: dict[str, Any]


def _check_same(out: Path, inputs: Mapping[str, Any]) -> None:
    """UserError where the folder was begun with other inputs; a checkpoint may have moved."""
    if not (out / SUMMARY).is_file():
        return
    begun = read_checked(out / SUMMARY, TypeAdapter(_Summary), "--out", "Give another folder.")["inputs"]
    for key, value in inputs.items():
        if key not in ("before", "after") and begun.get(key) != value:
            was = f"{begun.get(key)} instead of {value}"
            name = key.removesuffix("_checksum")
            problem = f"begun with another checkpoint {name}." if name != key else f"begun with {key} {was}."
            raise UserError("--out", str(out), problem, "Give another folder, or the inputs that it was begun with.")
