"""What two processes see of masters, Adam states and checkpoints under every ZeRO stage; rank 0 writes it as JSON.

python masters_driver.py FOLDER      (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)
"""

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatscale.config.ds_config import merge_ds_config
from qatscale.config.recipe import load_run_config
from qatscale.engine.agreement import Agreement
from qatscale.engine.checkpoints.files import list_checkpoints
from qatscale.engine.checkpoints.load import load_checkpoint
from qatscale.engine.checkpoints.manifest import Manifest
from qatscale.engine.checkpoints.reader import find_checkpoint
from qatscale.engine.checkpoints.save import extremes_of_copies, parameter_records, slices_of, write_checkpoint
from qatscale.engine.initialize import initialize_engine
from qatscale.engine.layout import Layout
from qatscale.engine.qat_metrics import SAMPLE, QatMetrics
from qatscale.engine.runtime import start_runtime
from qatscale.engine.topology import Topology
from qatscale.engine.zero_masters import ZeroMasters
from qatscale.errors import UserError
from qatscale.quant.plugin import QatPlugin, scale_groups

LAYOUTS = [
    (stage, precision, threshold)
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for threshold in ((0, 100_000) if stage == 3 else (None,))
]
CONFIG = load_run_config("debug", ["batch.sequences=2", "qat.bits=3", "optimizer.learning_rate=1e-2"])


class Odd(nn.Module):
    """Sizes that two processes cannot halve: 35, 15 and 5 weights, 5 and 3 scales, and one of a single element."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Linear(7, 5, bias=False)
        self.norm = nn.Parameter(torch.ones(5))
        self.down = nn.Linear(5, 3, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        for parameter in (self.up.weight, self.down.weight):
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 7] -> a scalar."""
        return (self.down(torch.tanh(self.up(x)) * self.norm) * self.gain).square().mean()


def build(stage: int, precision: str, threshold: int | None) -> tuple[Any, ZeroMasters, QatPlugin]:
    ds: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if threshold is not None:
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    if precision == "bf16":
        ds["bf16"] = {"enabled": True}
    model = Odd()
    plugin = QatPlugin(CONFIG.qat, 3)
    plugin.prepare(model)
    topology = Topology(CONFIG, Layout(runtime.ranks), runtime)
    engine, masters = initialize_engine(model, plugin, CONFIG, merge_ds_config(CONFIG, ds, runtime.ranks), topology)
    return engine, masters, plugin


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + runtime.rank)
    x = torch.randn(1, 7, generator=generator)
    return x.to(next(engine.module.parameters()).dtype)


def train(first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = engine(batch(step))
        engine.backward(loss)
        engine.step()
        torch.distributed.all_reduce(total := loss.detach().float())
        losses.append(float(total))
    return losses


def state(masters: ZeroMasters) -> dict[str, list[float]]:
    """All masters, whole. Collective."""
    by_name = dict(engine.module.named_parameters())
    return {name: masters.full(by_name[name]).flatten().tolist() for name in masters.shapes}


def adam(masters: ZeroMasters) -> dict[str, list[float]]:
    """Parameter → [its steps, the sum of its absolute moments] on this process, of the parameters it holds."""
    found = {}
    for partition, fragments in masters.by_partition().items():
        own = masters.adam_state(partition)
        for fragment in fragments:
            moments = sum(float(fragment.of(own[kind]).abs().sum()) for kind in ("exp_avg", "exp_avg_sq"))
            found[fragment.name] = [masters.steps_taken(partition), moments]
    return found


def save(folder: Path, step: int) -> Path:
    draft = Manifest(
        step=step, tokens=0, reason="interval", kept=False, recipe_hash="", data="", plugin=plugin.state(),
        parameters=parameter_records(masters), layout={},
    )  # fmt: skip
    return write_checkpoint(folder, draft, slices_of(masters), runtime, agreement, extremes_of_copies(masters))


def observe_masters() -> dict[str, Any]:
    """full, assign and reset_state, before and after two steps."""
    seen: dict[str, Any] = {"shapes": {name: list(shape) for name, shape in masters.shapes.items()}}
    seen["initial"] = state(masters)
    seen["adam before"] = adam(masters)
    train(0, 2)
    seen["adam after"] = adam(masters)
    by_name = dict(engine.module.named_parameters())
    seen["loss before assign"] = float(engine(batch(7)))
    for name, shape in masters.shapes.items():
        masters.assign(by_name[name], torch.arange(shape.numel(), dtype=torch.float32).view(shape) / 64 + 0.25)
    seen["assigned"] = state(masters)
    with torch.no_grad():
        engine.eval()
        seen["loss after assign"] = float(engine(batch(7)))
        engine.train()
    masters.reset_state([scale for group in scale_groups(engine.module).values() for scale in group])
    seen["adam reset"] = adam(masters)
    try:
        masters.assign(by_name["norm"], torch.ones(4))
    except ValueError as error:
        seen["wrong shape"] = str(error)
    return seen


def observe_codes() -> dict[str, list[float]]:
    """Counts between two sets of random masters, some scales negative, of a model twice as large as SAMPLE."""
    metrics = QatMetrics(masters, engine.module, 2 * SAMPLE)
    by_name = dict(engine.module.named_parameters())
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        for name, shape in masters.shapes.items():
            masters.assign(by_name[name], torch.randn(shape, generator=generator) + 0.5 * name.endswith("_scale"))
        if seed == 1:
            metrics.before_step()
    return {"compared": metrics.counts().tolist(), "alone": metrics.counts().tolist()}


def failing_saves(folder: Path) -> dict[str, Any]:
    """A disk that is full for rank 1, for rank 0, and a folder that cannot be made."""
    save(folder, 1)
    seen: dict[str, Any] = {}
    for victim in (1, 0):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if runtime.rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            save(folder, 2)
        except OSError as error:
            seen[f"rank {victim}"] = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    blocked = folder / "blocked"
    torch.distributed.barrier()
    if runtime.is_main:
        blocked.write_text("a file where the folder should be")
    try:
        save(blocked, 2)
    except OSError as error:
        seen["blocked"] = str(error)
    torch.distributed.barrier()
    seen["left"] = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    save(folder, 2)
    seen["found then"] = [path.name for path in list_checkpoints(folder)]
    return seen


def poisoned_copy(folder: Path) -> str:
    """NaN in a moment that rank 1 alone holds and another process would save, as under tensor parallelism."""
    if runtime.rank == 1:
        copy = replace(masters.fragments[0], saved=False)
        masters.fragments[0] = copy
        copy.of(masters.adam_state(copy.partition)["exp_avg_sq"])[-1] = torch.nan
    try:
        save(folder, 4)
    except FloatingPointError as error:
        return str(error)
    return ""


def damaged_for_one(folder: Path) -> str:
    """Rank 1's share of the files is damaged: every process has to say so."""
    torch.distributed.barrier()
    if runtime.is_main:
        shard = find_checkpoint(folder / "step-00000002") / "shard-00001-of-00002.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    torch.distributed.barrier()
    try:
        load_checkpoint(folder / "step-00000002", masters, runtime)
    except UserError as error:
        return str(error)
    return ""


folder = Path(sys.argv[1])
runtime = start_runtime()
agreement = Agreement(runtime)
result: dict[str, Any] = {"masters": {}, "cross": {}}
for layout in LAYOUTS:
    engine, masters, plugin = build(*layout)
    result["masters"]["-".join(map(str, layout))] = observe_masters() | {"codes": observe_codes()}

for precision in ("fp32", "bf16"):
    engine, masters, plugin = build(1, precision, None)
    train(0, 3)
    saved = save(folder / precision, 3)
    expected = state(masters)
    entry = {"adam": adam(masters), "losses": train(3, 2), "loaded": {}}
    for layout in (layout for layout in LAYOUTS if layout[1] == precision):
        engine, masters, plugin = build(*layout)
        load_checkpoint(saved, masters, runtime)
        again = save(folder / "-".join(map(str, layout)), 3)
        entry["loaded"]["-".join(map(str, layout))] = {
            "same masters": state(masters) == expected, "again": str(again), "losses": train(3, 2),
        }  # fmt: skip
    result["cross"][precision] = entry | {"saved": str(saved)}

result["failing"] = failing_saves(folder / "failing")
result["poisoned"] = poisoned_copy(folder / "failing")
result["damaged"] = damaged_for_one(folder / "failing")
(folder / f"rank-{runtime.rank}.json").write_text(json.dumps(result))
