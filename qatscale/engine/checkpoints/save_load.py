"""Save the masters and Adam states of a running engine, and put them back under the same or another layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qatscale.engine.checkpoints.files import (
    CheckpointReader,
    Manifest,
    ParameterRecord,
    commit,
    slice_name,
    verify_files,
    write_shard,
    writing_folder,
)
from qatscale.engine.fragments import MOMENTS, ZeroMasters
from qatscale.engine.runtime import Runtime
from qatscale.errors import UserError
from qatscale.quant.plugin import merge_states


def save_checkpoint(
    checkpoints: Path,
    masters: ZeroMasters,
    runtime: Runtime,
    *,
    step: int,
    tokens: int,
    reason: str,
    kept: bool,
    recipe_hash: str,
    data: str,
    plugin: dict[str, Any],
    layout: dict[str, int] | None = None,
) -> Path:
    """Write a checkpoint. Collective; when it returns, the checkpoint is complete and on disk.

    A failure of any process (a full disk, say) is raised on all of them and leaves the former checkpoints as they were.
    """
    writing = writing_folder(checkpoints, step)
    outcome: dict[str, Any] = {}
    if runtime.is_main:
        try:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        except OSError as error:  # not raised yet: the others are on their way to the barrier
            outcome = {"error": f"process 0: {error}"}
    dist.barrier()
    if not outcome:
        try:
            outcome = _write_own_share(writing, masters, runtime) | {"plugin": plugin}
        except OSError as error:
            outcome = {"error": f"process {runtime.rank}: {error}"}

    outcomes: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(outcomes, outcome)
    errors = [o["error"] for o in outcomes if "error" in o]
    if not errors and runtime.is_main:
        parameters = {name: record for o in outcomes for name, record in o["parameters"].items()}
        manifest = Manifest(
            step=step,
            tokens=tokens,
            reason=reason,
            kept=kept,
            recipe_hash=recipe_hash,
            data=data,
            plugin=merge_states(o["plugin"] for o in outcomes),
            parameters=dict(sorted(parameters.items())),
            layout={"processes": runtime.ranks, "zero_stage": masters.stage, **(layout or {})},
            files={o["file"].pop("name"): o["file"] for o in outcomes},
        )
        try:
            commit(checkpoints, manifest)
        except OSError as error:
            errors = [f"process 0: {error}"]
    agreed: list[Any] = [errors]
    dist.broadcast_object_list(agreed, src=0)
    if agreed[0]:
        if runtime.is_main:
            shutil.rmtree(writing, ignore_errors=True)
        raise OSError(f"the checkpoint of step {step} was not written: {'; '.join(agreed[0])}")
    return checkpoints / f"step-{step:08d}"


def _write_own_share(writing: Path, masters: ZeroMasters, runtime: Runtime) -> dict[str, Any]:
    """Write what this process holds; returns what the manifest has to know of it."""
    slices: dict[str, Tensor] = {}
    for partition, fragments in masters.by_partition().items():
        state = masters.adam_state(partition)
        for fragment in (fragment for fragment in fragments if fragment.saved):
            sources = {"weight": partition, **{moment: state[moment] for moment in MOMENTS}}
            for kind, flat in sources.items():
                name = slice_name(kind, fragment.name, fragment.start, fragment.columns)
                slices[name] = fragment.of(flat)
    return {
        "file": write_shard(writing, runtime.rank, runtime.ranks, slices),
        "parameters": {
            f.name: ParameterRecord(list(masters.shapes[f.name]), masters.steps_taken(f.partition))
            for f in masters.fragments
        },
    }


@torch.no_grad()
def load_checkpoint(
    folder: Path, masters: ZeroMasters, runtime: Runtime, *, keep: Callable[[str], bool] | None = None
) -> Manifest:
    """Put a checkpoint's masters and Adam states into a fresh engine. Collective.

    Parameters of which `keep` is true keep their initial value, whatever the checkpoint has of them (scales of a branch
    that are not yet in use). Raises UserError for a damaged checkpoint and for one of another model.
    """
    reader = CheckpointReader(folder)
    _raise_everywhere(lambda: verify_files(folder, reader.manifest, runtime.rank, runtime.ranks), runtime)
    saved = reader.manifest.parameters
    loaded = {name: shape for name, shape in _whole_shapes(masters, runtime).items() if not (keep and keep(name))}
    _check_same_model(folder, loaded, {name: record for name, record in saved.items() if not (keep and keep(name))})
    for partition, fragments in masters.by_partition().items():
        state = masters.adam_state(partition)
        steps = {saved[f.name].adam_steps for f in fragments if f.name in loaded}
        if not steps:
            continue
        assert len(steps) == 1, f"one optimizer group, several Adam step counts: {steps}"
        state["step"].fill_(steps.pop())
        for fragment in fragments:
            if fragment.name not in loaded:
                continue
            targets = {"weight": partition, **{moment: state[moment] for moment in MOMENTS}}
            for kind, flat in targets.items():
                fragment.of(flat).copy_(
                    reader.read(kind, fragment.name, fragment.start, fragment.numel, fragment.columns)
                )
    masters.refresh_working_copies()
    return reader.manifest


def _whole_shapes(masters: ZeroMasters, runtime: Runtime) -> dict[str, torch.Size]:
    """Of all parameters of the model, on whichever stage they are. Collective."""
    shapes: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(shapes, masters.shapes)
    return {name: shape for of_one in shapes for name, shape in of_one.items()}


def _check_same_model(folder: Path, shapes: dict[str, torch.Size], saved: dict[str, ParameterRecord]) -> None:
    expected = {name: list(shape) for name, shape in shapes.items()}
    missing = sorted(expected.keys() - saved.keys())
    if missing:
        raise UserError("checkpoint", str(folder), f"it lacks {len(missing)} parameters of this model: {missing[:3]}.")
    surplus = sorted(saved.keys() - expected.keys())
    if surplus:
        there = f"{len(surplus)} of its parameters are not in this model: {surplus[:3]}."
        raise UserError("checkpoint", str(folder), there)
    for name, shape in expected.items():
        if saved[name].shape != shape:
            there = f"{name} has shape {saved[name].shape} there and {shape} in this model."
            raise UserError("checkpoint", str(folder), there)


def _raise_everywhere(check: Any, runtime: Runtime) -> None:
    """Run a check on this process; if it fails on any, raise on all, so that none is left waiting."""
    found: UserError | None = None
    try:
        check()
    except UserError as error:
        found = error
    everyone: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(everyone, (found.key, found.value, found.allowed, found.do) if found else None)
    first = next((e for e in everyone if e), None)
    if first:
        raise UserError(*first)
