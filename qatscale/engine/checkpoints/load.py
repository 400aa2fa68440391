"""Put the masters and Adam states of a checkpoint into an engine of the same or another layout."""

from __future__ import annotations

from pathlib import Path

import torch

from qatscale.engine.agreement import Agreement
from qatscale.engine.checkpoints import files
from qatscale.engine.checkpoints.manifest import Manifest
from qatscale.engine.checkpoints.reader import CheckpointReader
from qatscale.engine.checkpoints.save import by_kind, parameter_records, slices_of
from qatscale.engine.runtime import Runtime, together
from qatscale.engine.zero_masters import ZeroMasters
from qatscale.errors import UserError


@torch.no_grad()
def load_checkpoint(folder: Path, masters: ZeroMasters, runtime: Runtime, *, keep_scales: bool = False) -> Manifest:
    """Put a checkpoint's masters and Adam states into a fresh engine. Collective.

    keep_scales: scales, which a branch does not use yet, keep their initial value, whatever the checkpoint has of them.
    Raises UserError for a damaged checkpoint and for one of another model.
    """

    def is_loaded(name: str) -> bool:
        return not (keep_scales and name.endswith(".weight_scale"))

    reader = CheckpointReader(folder)
    together(lambda: files.verify_files(folder, reader.manifest, runtime.rank, runtime.ranks), runtime)
    saved = {name: record for name, record in reader.manifest.parameters.items() if is_loaded(name)}
    agreement = Agreement(runtime)  # the shapes of all processes come to the first alone
    shapes = agreement.gather(lambda: {name: record.shape for name, record in parameter_records(masters).items()})

    def check_same_model() -> None:
        """UserError where a checkpoint's parameters or their shapes are not the model's."""
        held = {name: shape for some in shapes for name, shape in some.items() if is_loaded(name)}
        problem = ""
        if missing := sorted(held.keys() - saved.keys()):
            problem = f"it lacks {len(missing)} parameters of this model: {missing[:3]}."
        elif surplus := sorted(saved.keys() - held.keys()):
            problem = f"{len(surplus)} of its parameters are not in this model: {surplus[:3]}."
        elif others := [name for name, shape in held.items() if saved[name].shape != shape]:
            name = others[0]
            problem = f"{name} has shape {saved[name].shape} in the checkpoint and {held[name]} in this model."
        if problem:
            raise UserError("checkpoint", str(folder), problem)

    agreement.gather(check_same_model if runtime.is_main else None)
    for partition, fragments in masters.by_partition().items():
        wanted = [fragment for fragment in fragments if fragment.name in saved]
        if not wanted:
            continue
        (steps,) = {saved[fragment.name].adam_steps for fragment in wanted}  # one optimizer group, one count
        masters.adam_state(partition)["step"].fill_(steps)
        for kind, flat in by_kind(masters, partition).items():
            for f in wanted:
                f.of(flat).copy_(reader.read(kind, f.name, f.start, f.numel, f.columns))
    together(lambda: files.check_finite(folder, slices_of(masters).items()), runtime)
    masters.refresh_working_copies()
    return reader.manifest
