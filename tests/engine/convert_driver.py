"""What real engines make of converted checkpoints; rank 0 writes it as JSON.

    python convert_driver.py FOLDER      (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)

FOLDER holds the token shards `data`, two Hugging Face folders and the runs imported from them. One process trains
`whole` and converts it; then one and two processes go on from the conversions, with DeepSpeed's own loader and ours.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qatscale.config.ds_config import load_ds_config, merge_ds_config
from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig
from qatscale.data.open import open_batches
from qatscale.engine.checkpoints.files import read_manifest
from qatscale.engine.checkpoints.load import load_checkpoint
from qatscale.engine.checkpoints.universal import universal_checkpoint_info
from qatscale.engine.initialize import initialize_engine
from qatscale.engine.layout import Layout
from qatscale.engine.runtime import start_runtime
from qatscale.engine.step import apply_settings, train_step
from qatscale.engine.topology import Topology
from qatscale.engine.zero_masters import ZeroMasters
from qatscale.model.initial_weights import initialise
from qatscale.model.llama import Llama
from qatscale.quant.plugin import QatPlugin
from qatscale.schedule.build import build_timeline
from qatscale.tracking.convert import convert
from qatscale.train.run import train

folder = Path(sys.argv[1])
asked = json.loads((folder / "asked.json").read_text())
OVERRIDES, AT = asked["overrides"], asked["at"]
runtime = start_runtime()


def build(config: RunConfig, ds_config: str, universal: bool) -> tuple[Any, ZeroMasters, QatPlugin]:
    """A plain module behind an engine, as the loop makes it."""
    model = Llama(config.model)
    initialise(model, config.seed)
    plugin = QatPlugin(config.qat, build_timeline(config).switch_step)
    plugin.prepare(model)
    ds = merge_ds_config(config, load_ds_config(ds_config), runtime.ranks)
    if universal:
        ds["checkpoint"] = {"load_universal": True}
    topology = Topology(config, Layout(data=runtime.ranks), runtime)
    engine, masters = initialize_engine(model, plugin, config, ds, topology)
    return engine, masters, plugin


def go_on(engine: Any, config: RunConfig, first: int) -> list[float]:
    """The mean losses of the steps from `first` to the end."""
    timeline = build_timeline(config)
    batches = open_batches(config, timeline)
    topology = Topology(config, Layout(data=runtime.ranks), runtime)
    losses = []
    for step in range(first, timeline.steps):
        apply_settings(engine, timeline.at(step))
        batch = torch.from_numpy(batches.batch(step, topology.place.data, topology.layout.data))
        parts = [loss.detach() for loss in train_step(engine, batch, config.batch.micro_batch, topology)]
        dist.all_reduce(total := torch.stack(parts).mean())
        losses.append(float(total) / runtime.ranks)
    return losses


def with_deepspeeds_loader(config: RunConfig, stage: int) -> dict[str, Any]:
    engine, _, plugin = build(config, f"zero{stage}_fp32", universal=True)
    _, client_state = engine.load_checkpoint(str(folder / "universal"))
    tag = folder / "universal" / (folder / "universal/latest_universal").read_text()
    plugin.load_state(json.loads((tag / "qatscale.json").read_text())["plugin"])
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    kept = ("name", "lr", "betas", "weight_decay", "lr_ratio", "decayed")
    return {
        "steps": engine.global_steps,
        "info": sorted(client_state["universal_checkpoint_info"]),
        "groups": [{key: group[key] for key in kept} for group in groups],
        "losses": go_on(engine, config, AT),
    }


def with_our_loader(config: RunConfig, stage: int) -> list[float]:
    """Goes on from our checkpoint; before that, DeepSpeed saves what was loaded, its converter makes it universal, and
    ours makes a run of that."""
    from deepspeed.checkpoint import ds_to_universal

    engine, masters, plugin = build(config, f"zero{stage}_fp32", universal=False)
    checkpoint = folder / f"runs/whole/checkpoints/step-{AT:08d}"
    load_checkpoint(checkpoint, masters, runtime)
    plugin.load_state(read_manifest(checkpoint).plugin)
    saved = folder / f"deepspeed-{runtime.ranks}-{stage}"
    engine.save_checkpoint(
        str(saved), tag="tag", client_state={"universal_checkpoint_info": universal_checkpoint_info(config)}
    )
    if runtime.is_main:
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(saved / "tag"), output_folder=str(saved / "uni"), num_extract_workers=1,
                num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
            )
        )  # fmt: skip
        recipe = str(folder / "runs/whole/recipe.yaml")
        convert(str(saved), "checkpoint", folder / f"runs/back-{runtime.ranks}-{stage}", recipe)
    dist.barrier()
    return go_on(engine, config, AT)


def branch(name: str, origin: str, *overrides: str) -> None:
    """Through the loop, as `qatscale branch` does."""
    recipe = folder / "runs" / origin / "recipe.yaml"
    outcome = train(load_run_config(recipe, [f"name={name}", *overrides]), f"{folder}/runs/{origin}")
    assert outcome.status == "done"


def refusal_of_zero3(config: RunConfig) -> str:
    engine, *_ = build(config, "zero3_fp32", universal=True)
    try:
        engine.load_checkpoint(str(folder / "universal"))
    except (AssertionError, KeyError, FileNotFoundError) as error:
        return type(error).__name__
    return "loaded"


if runtime.ranks == 1:
    train(load_run_config("debug", [*OVERRIDES, "name=whole"]))
    convert(f"{folder}/runs/whole@{AT}", "universal", folder / "universal")
config = load_run_config("debug", OVERRIDES)
result: dict[str, Any] = {"loaded": {}, "saved": {}}
for stage in (1, 2):
    result["loaded"][stage] = with_deepspeeds_loader(config, stage)
for stage in asked["saved"][str(runtime.ranks)]:
    result["saved"][stage] = with_our_loader(config, stage)
    branch(f"from-back-{runtime.ranks}-{stage}", f"back-{runtime.ranks}-{stage}")
for name, origin, overrides in asked["branches"][str(runtime.ranks)]:
    branch(name, origin, *overrides)
if runtime.ranks == 1:
    result["zero3"] = refusal_of_zero3(config)
if runtime.is_main:
    (folder / f"result-{runtime.ranks}.json").write_text(json.dumps(result))
