"""DeepSpeed's universal checkpoint: written so that DeepSpeed 0.19.8 reads it, and read without running code from it.

::

    FOLDER/latest_universal                             names the folder below; engine.load_checkpoint looks for it
    FOLDER/step-00000120/
        zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt   full parameters: {"param": tensor, "cat_dim": how TP splits it}
        zero/<parameter>/step.pt                        Adam's count
        zero/optimizer_state.pt                         param_groups, for ZeRO-1 and 2
        mp_rank_00_model_states.pt                      step counts, universal_checkpoint_info with the TP patterns
        recipe.yaml  qatscale.json                      ours: what DeepSpeed does not know

DeepSpeed reads it into a plain module under ZeRO-1 and 2, on any number of processes. Under ZeRO-3 it would give every
parameter group the settings and the step count of the first (`load_hp_checkpoint_state_from_checkpoint_dir_stage3`), so
that norms and scales are silently decayed and scales learn at the weights' rate. So this layout omits what DeepSpeed
needs under ZeRO-3, and DeepSpeed stops with an error. Our own checkpoints know no such limit.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from qatscale.config.recipe import load_run_config, recorded_yaml
from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Manifest
from qatscale.data.open import joined
from qatscale.engine.checkpoints.files import KINDS
from qatscale.engine.checkpoints.manifest import PluginState
from qatscale.engine.checkpoints.training_state import UNKNOWN_DATA, Skeleton, TrainingState
from qatscale.errors import UserError, first_line
from qatscale.files import Count, read_checked, sealed, sha256_of, write_json
from qatscale.new_folder import appearing
from qatscale.schedule.build import build_timeline
from qatscale.tensor_files import Shape, not_finite

DEEPSPEED = "0.19.8"
"""The release whose layout this is."""
LATEST, OPTIMIZER, MODEL = "latest_universal", "optimizer_state.pt", "mp_rank_00_model_states.pt"
RECIPE, SIDE_FILE = "recipe.yaml", "qatscale.json"
KEY = "universal checkpoint"
FILES = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}

# --- which parameters tensor parallelism splits, and how ---


def universal_checkpoint_info(config: RunConfig) -> dict[str, Any]:
    """The facts about a model that DeepSpeed's converter and loader need.

    Pass it in the client_state of DeepSpeed's own save_checkpoint, at any degree of tensor parallelism: without it a
    later split is silently wrong. Patterns match from the start of a name (re.match), and each must match a name.
    """
    patterns: dict[str, list[str]] = {"replicated": [], "rows": [], "vocabulary": []}
    for name, shape in Skeleton(config).shapes.items():
        pattern = re.sub(r"\d+", r"\\d+", re.escape(name)) + "$"
        for kind in _split(name, shape):
            if pattern not in patterns[kind]:
                patterns[kind].append(pattern)
    return {
        "universal_checkpoint_version": 0.4,
        "original_vocab_size": config.model.vocab_size,
        "tp_replicated_parameter_patterns": patterns["replicated"],
        "parameter_with_row_parallelism_patterns": patterns["rows"],
        "vocabulary_parameter_patterns": patterns["vocabulary"],
    }


def _split(name: str, shape: Shape) -> set[str]:
    """`replicated`: full on every process; `rows`: row-parallel, cut along dimension 1; `vocabulary`: its rows are
    tokens, padded where they do not divide. Neither of the first two: cut along dimension 0."""
    layer = name.rsplit(".", 2)[-2]
    if layer in ("o", "down"):
        return {"rows"} if len(shape) == 2 else {"replicated"}  # one scale a row: all processes share it
    if layer in ("embed", "head"):
        return {"vocabulary"} if name.endswith(".weight") else set()
    return {"replicated"} if layer.endswith("norm") else set()


# --- writing ---


def write_universal(state: TrainingState, out: Path) -> None:
    """One parameter at a time. The folder appears when it is complete, or not at all."""
    model_states = {
        "ds_version": DEEPSPEED,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": state.step,
        "global_samples": state.step * state.config.batch.sequences,
        "skipped_steps": 0,
        "lr_scheduler": None,
        "universal_checkpoint_info": universal_checkpoint_info(state.config),
    }
    with appearing(out) as folder:
        inner = folder / f"step-{state.step:08d}"
        for name, shape in state.shapes.items():
            _write_parameter(state, name, shape, inner / "zero" / name)
        _save({"ds_version": DEEPSPEED, "param_groups": _param_groups(state)}, inner / "zero" / OPTIMIZER)
        _save(model_states, inner / MODEL)
        (inner / RECIPE).write_text(recorded_yaml(state.config))
        known = {"format": 1, "source": state.source, "step": state.step, "data": state.data, "plugin": state.plugin}
        files = {str(path.relative_to(inner)): sha256_of(path) for path in sorted(inner.rglob("*")) if path.is_file()}
        write_json(inner / SIDE_FILE, sealed({**known, "tokenizer": state.tokenizer, "files": files}))
        (folder / LATEST).write_text(inner.name)


def _write_parameter(state: TrainingState, name: str, shape: Shape, folder: Path) -> None:
    folder.mkdir(parents=True)
    split = _split(name, shape)
    about: dict[str, Any] = {} if "replicated" in split else {"cat_dim": 1 if "rows" in split else 0}
    if "vocabulary" in split:
        about["vocab_tensor"] = True
    for kind in KINDS:
        known = kind == "weight" or state.adam_steps[name]
        _save({**about, "param": state.read(kind, name) if known else torch.zeros(shape)}, folder / FILES[kind])
    _save(torch.tensor(float(state.adam_steps[name])), folder / "step.pt")


def _param_groups(state: TrainingState) -> list[dict[str, Any]]:
    """AdamW's groups with the settings of the next step, on which another loop that continues may rely."""
    config, timeline = state.config, build_timeline(state.config)
    now = timeline.at(min(state.step, timeline.steps - 1))
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "lr": now.learning_rate * group["lr_ratio"],
            "betas": now.betas,
            "eps": config.optimizer.eps,
            "weight_decay": now.weight_decay if group["decayed"] else 0.0,
        }
        for group in Skeleton(config).groups
    ]


def _save(content: Any, path: Path) -> None:
    """Raises OSError, e.g. for a full disk."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch makes of an OSError when it closes its archive
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


# --- reading ---


def find_universal(folder: Path) -> Path | None:
    """The folder that holds zero/: `folder` itself, or the one that its latest_universal names. None: neither."""
    if (folder / "zero").is_dir():
        return folder
    if (folder / LATEST).is_file():
        named = folder / (folder / LATEST).read_text(errors="replace").strip()
        if os.path.isdir(named / "zero"):  # noqa: PTH112 - False, too, for what no system takes for a name
            return named
    return None


def read_universal(folder: Path, recipe: str | None, overrides: Sequence[str] = ()) -> TrainingState:
    """The state in the folder that holds zero/.

    Ours, or what DeepSpeed's ds_to_universal wrote from a plain module's checkpoint. UserError where it is damaged,
    holds more than numbers, or is not a state of the recipe's run.
    """
    own = (folder / SIDE_FILE).is_file()
    if own and (recipe is not None or overrides):
        problem = f"{folder} contains its run's recipe and state ({SIDE_FILE})."
        raise UserError("--recipe", recipe or " ".join(overrides), problem, "Leave it out, or give it to the branch.")
    if not own and recipe is None:
        problem = "is needed: a universal checkpoint does not describe its run."
        fix = "Give that run's recipe.yaml, or a name and its key=value overrides."
        raise UserError("--recipe", None, problem, fix)
    known = _side_file(folder) if own else None
    config = load_run_config(folder / RECIPE) if own else load_run_config(str(recipe), overrides)
    bones = Skeleton(config)
    reader = _Reader(folder, config, bones)
    adam_steps = {name: reader.steps(name) for name in bones.shapes}
    if known is not None:
        step, data, plugin = known["step"], known["data"], dict(known["plugin"])
        tokenizer = known.get("tokenizer")
    else:
        step, plugin = _place(config, bones, adam_steps, reader)
        folders = config.data.sources
        known_data = joined({name: Manifest.load(path) for name, path in folders.items()}) if folders else None
        data = known_data.fingerprint if known_data else UNKNOWN_DATA
        tokenizer = known_data.tokenizer.fingerprint if known_data else None
    return TrainingState(config, str(folder), step, data, plugin, bones.shapes, adam_steps, reader.read, tokenizer)


class _SideFile(TypedDict):
    step: Count
    data: str
    plugin: PluginState
    tokenizer: NotRequired[str | None]
    files: NotRequired[dict[str, str]]
    """Checksums by path; version 0.2 wrote none."""


def _side_file(folder: Path) -> _SideFile:
    """UserError where it is damaged, or where a file differs from its checksum."""
    known = read_checked(folder / SIDE_FILE, TypeAdapter(_SideFile), KEY)
    for name, checksum in known.get("files", {}).items():
        if not (folder / name).is_file() or sha256_of(folder / name) != checksum:
            raise UserError(KEY, str(folder / name), "is missing, or was altered: its checksum differs.")
    return known


class _Reader:
    """Full parameters of a universal folder. Missing scales have not been switched on: they are 1.

    UserError unless the folder holds the parameters of the recipe's model, in their shapes.
    """

    def __init__(self, folder: Path, config: RunConfig, bones: Skeleton) -> None:
        self.folder, self.bones = folder, bones
        self.present = {path.name for path in (folder / "zero").iterdir() if path.is_dir()}
        tied = {f"head.{name.partition('.')[2]}" for name in bones.shapes if name.startswith("embed.")}
        surplus = sorted(self.present - bones.shapes.keys() - (tied if config.model.tied_embedding else set()))
        missing = sorted(bones.shapes.keys() - self.present - set(bones.scales))
        if surplus or missing:
            what = f"lacks {missing[:3]} of" if missing else f"holds {surplus[:3]}, which are not in"
            count = len(missing or surplus)
            raise self.error(f"{what} the recipe's model ({count} parameters).", "Is it the right recipe?")
        for name in sorted(bones.shapes.keys() & self.present):
            for kind in KINDS:
                found = tuple(self._tensor(kind, name).shape)
                if found != bones.shapes[name]:
                    raise self.error(f"{kind} of {name} has shape {found}, in the recipe {bones.shapes[name]}.")

    def steps(self, name: str) -> int:
        if name not in self.present:
            return 0
        path = self.folder / "zero" / name / "step.pt"
        if not path.is_file():
            problem = f"{name} has no step.pt: made from ZeRO-3, of which DeepSpeed keeps one count for all parameters."
            raise self.error(problem, "Save under ZeRO-1 or 2, or as a checkpoint of ours.")
        return int(self._load(path))

    def read(self, kind: str, name: str) -> Tensor:
        value = self._tensor(kind, name).float() if name in self.present else torch.ones(self.bones.shapes[name])
        if wrong := not_finite([(f"{kind} of {name}", value)]):
            raise self.error(f"{wrong} is not finite.")
        return value

    def _tensor(self, kind: str, name: str) -> Tensor:
        path = self.folder / "zero" / name / FILES[kind]
        content = self._load(path)
        value = content.get("param") if isinstance(content, Mapping) else None
        if not isinstance(value, Tensor):
            problem = f"{path.relative_to(self.folder)} is not a full parameter: made from ZeRO-3, or of another model."
            raise self.error(problem, "Save under ZeRO-1 or 2, or as a checkpoint of ours.")
        return value

    def _load(self, path: Path) -> Any:
        """Numbers alone: what would run code is refused by torch's weights-only reader."""
        shown = path.relative_to(self.folder)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise self.error(f"{shown} is missing.") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            problem = f"{shown} is damaged, or holds more than numbers and is not read: {first_line(error)}"
            raise self.error(problem) from None

    def error(self, problem: str, fix: str = "") -> UserError:
        return UserError(KEY, str(self.folder), problem, fix)


def _place(
    config: RunConfig, bones: Skeleton, adam_steps: Mapping[str, int], reader: _Reader
) -> tuple[int, dict[str, Any]]:
    """(optimizer steps done, the plugin's state) of a run of this recipe, from what Adam has counted.

    A scale is 1 until the switch, which resets it and its count; also the weights' count where the recipe asks for it.
    """
    scales = bones.scales
    counts = [{adam_steps[name] for name in group["params"]} for group in bones.groups]
    if any(len(found) > 1 for found in counts):
        raise reader.error("parameters of one optimizer group have taken different numbers of steps.")
    of_weights = adam_steps[next(name for name in bones.shapes if name not in scales)]
    switch = build_timeline(config).switch_step
    if not any(bool((reader.read("weight", name) != 1).any()) for name in scales):
        if switch is not None and of_weights > switch:
            problem = (
                f"its scales are as before the switch, after {of_weights} steps; this recipe switches at {switch}."
            )
            raise reader.error(problem, "Give the recipe it was trained with.")
        return of_weights, bones.plugin
    step = of_weights + (switch or 0 if config.qat.optimizer_state == "reset" else 0)
    since = {adam_steps[name] for name in scales}
    if switch is None or since != {step - switch}:
        problem = f"it has switched to QAT, with {of_weights} steps of the weights and {sorted(since)} of the scales; "
        here = "this recipe never switches." if switch is None else f"this recipe switches at step {switch}."
        raise reader.error(problem + here, "Give the recipe it was trained with.")
    # What the scales were right after the switch is unknown: an empty digest equals none.
    at_switch = dict.fromkeys(bones.plugin["bits"], "")
    return step, {**bones.plugin, "switched_at": switch, "scales_at_switch": at_switch}
