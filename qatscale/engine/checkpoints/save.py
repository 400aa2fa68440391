"""Save the masters and Adam states of a running engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatscale.engine.agreement import Agreement
from qatscale.engine.checkpoints import files
from qatscale.engine.checkpoints.manifest import Manifest, ParameterRecord
from qatscale.engine.runtime import Runtime
from qatscale.engine.zero_masters import MOMENTS, ZeroMasters
from qatscale.quant.plugin import merge_states
from qatscale.tensor_files import not_finite


def parameter_records(masters: ZeroMasters) -> dict[str, ParameterRecord]:
    """The manifest's records of the parameters whose first element this process holds: each is sent to rank 0 once."""
    return {
        f.name: ParameterRecord(list(masters.shapes[f.name]), masters.steps_taken(f.partition))
        for f in masters.fragments
        if f.start == 0 and (f.columns is None or f.columns[0] == 0)
    }


def slices_of(masters: ZeroMasters, saved: bool = True) -> dict[str, Tensor]:
    """What this process writes: slice name -> its elements, flat, fp32; views of the masters and of Adam's state.

    saved: False for its copies of what another process writes.
    """
    slices: dict[str, Tensor] = {}
    for partition, fragments in masters.by_partition().items():
        for kind, flat in by_kind(masters, partition).items():
            for fragment in fragments:
                if fragment.saved == saved:
                    name = files.slice_name(kind, fragment.name, fragment.start, fragment.columns)
                    slices[name] = fragment.of(flat)
    return slices


def extremes_of_copies(masters: ZeroMasters) -> dict[str, Tensor]:
    """(least, largest) of what this process holds and another one writes: NaN in a copy would be trained on, too."""
    copies = slices_of(masters, saved=False)
    return {name: torch.stack(torch.aminmax(values)) for name, values in copies.items() if values.numel()}


def by_kind(masters: ZeroMasters, partition: Tensor) -> dict[str, Tensor]:
    state = masters.adam_state(partition)
    return {"weight": partition, **{moment: state[moment] for moment in MOMENTS}}


def write_checkpoint(
    checkpoints: Path,
    draft: Manifest,
    slices: Mapping[str, Tensor],
    runtime: Runtime,
    agreement: Agreement,
    unsaved: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint. Collective; when it returns, the checkpoint is complete and on disk.

    draft: the manifest as far as each process knows it, without files. agreement: of this thread alone.
    unsaved: what has to be finite, too, and is not written.
    A failure of any process (a full disk, say) is raised on all of them and leaves the former checkpoints as they were.
    FloatingPointError where a value is not finite: such a state would fail for ever.
    """
    writing = files.writing_folder(checkpoints, draft.step)

    def make_folder() -> None:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)

    def write_own_share() -> dict[str, Any]:
        if wrong := not_finite([*slices.items(), *(unsaved or {}).items()]):
            raise FloatingPointError(f"{wrong} is not finite. Lower optimizer.learning_rate, or branch from before.")
        file = files.write_shard(writing, runtime.rank, runtime.ranks, slices)
        return {"file": file, "plugin": draft.plugin, "parameters": draft.parameters}

    def commit_all() -> None:
        parameters = {name: record for share in shares for name, record in share["parameters"].items()}
        manifest = replace(
            draft,
            plugin=merge_states(share["plugin"] for share in shares),
            parameters=dict(sorted(parameters.items())),
            files={share["file"].pop("name"): share["file"] for share in shares},
        )
        files.commit(checkpoints, manifest)

    try:
        agreement.gather(make_folder if runtime.is_main else None)
        shares = agreement.gather(write_own_share)
        agreement.gather(commit_all if runtime.is_main else None)
    except (OSError, FloatingPointError) as error:
        if runtime.is_main:
            shutil.rmtree(writing, ignore_errors=True)
        raise type(error)(f"the checkpoint of step {draft.step} was not written: {error}") from error
    return files.step_folder(checkpoints, draft.step)
