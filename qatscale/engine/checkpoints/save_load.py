"""Save the masters and Adam states of a running engine, and put them back under the same or another layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
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
    step_folder,
    verify_files,
    write_shard,
    writing_folder,
)
from qatscale.engine.runtime import Runtime
from qatscale.engine.zero_masters import MOMENTS, ZeroMasters
from qatscale.errors import UserError
from qatscale.quant.plugin import merge_states


def describe(
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
) -> Manifest:
    """The manifest of a checkpoint of this moment, as far as this process knows it alone."""
    return Manifest(
        step=step,
        tokens=tokens,
        reason=reason,
        kept=kept,
        recipe_hash=recipe_hash,
        data=data,
        plugin=plugin,
        parameters={
            f.name: ParameterRecord(list(masters.shapes[f.name]), masters.steps_taken(f.partition))
            for f in masters.fragments
        },
        layout={"processes": runtime.ranks, "zero_stage": masters.stage, **(layout or {})},
    )


def slices_of(masters: ZeroMasters) -> dict[str, Tensor]:
    """What this process writes: slice name -> its elements, flat, fp32; views of the masters and of Adam's state."""
    slices: dict[str, Tensor] = {}
    for partition, fragments in masters.by_partition().items():
        state = masters.adam_state(partition)
        sources = {"weight": partition, **{moment: state[moment] for moment in MOMENTS}}
        for kind, flat in sources.items():
            for fragment in fragments:
                if fragment.saved:
                    name = slice_name(kind, fragment.name, fragment.start, fragment.columns)
                    slices[name] = fragment.of(flat)
    return slices


def write_checkpoint(
    checkpoints: Path,
    draft: Manifest,
    slices: Mapping[str, Tensor],
    runtime: Runtime,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint. Collective; when it returns, the checkpoint is complete and on disk.

    draft, slices: what each process has of it, from `describe` and `slices_of`. group: all processes; one of its own
    (gloo) where other threads communicate meanwhile; None = the default group.
    A failure of any process (a full disk, say) is raised on all of them and leaves the former checkpoints as they were.
    """
    writing = writing_folder(checkpoints, draft.step)

    def make_folder() -> None:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)

    def write_own_share() -> dict[str, Any]:
        file = write_shard(writing, runtime.rank, runtime.ranks, slices)
        return {"file": file, "plugin": draft.plugin, "parameters": draft.parameters}

    def commit_all() -> None:
        parameters = {name: record for share in shares for name, record in share["parameters"].items()}
        manifest = replace(
            draft,
            plugin=merge_states(share["plugin"] for share in shares),
            parameters=dict(sorted(parameters.items())),
            files={share["file"].pop("name"): share["file"] for share in shares},
        )
        commit(checkpoints, manifest)

    try:
        _together(make_folder if runtime.is_main else None, runtime, group)
        shares = _together(write_own_share, runtime, group)
        _together(commit_all if runtime.is_main else None, runtime, group)
    except OSError as error:
        if runtime.is_main:
            shutil.rmtree(writing, ignore_errors=True)
        raise OSError(f"the checkpoint of step {draft.step} was not written: {error}") from error
    return step_folder(checkpoints, draft.step)


def _together(work: Callable[[], Any] | None, runtime: Runtime, group: dist.ProcessGroup | None) -> list[Any]:
    """Do it on this process; what it gives on each of them. An OSError of one is raised on all. Collective."""
    own: tuple[Any, str] = (None, "")
    try:
        own = (work() if work else None, "")
    except OSError as error:  # not raised yet: the others are on their way to hear of it
        own = (None, f"process {runtime.rank}: {error}")
    outcomes = [own]
    if runtime.ranks > 1:
        outcomes *= runtime.ranks
        dist.all_gather_object(outcomes, own, group=group)
    if errors := [error for _, error in outcomes if error]:
        raise OSError("; ".join(errors))
    return [given for given, _ in outcomes]


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
    dist.all_gather_object(everyone, (found.key, found.value, found.problem, found.fix) if found else None)
    first = next((e for e in everyone if e), None)
    if first:
        raise UserError(*first)
