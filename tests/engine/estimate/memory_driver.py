"""Measures what real steps allocate and send under the layouts of a JSON file, on CPU, and writes it to rank-N.json.

    python memory_driver.py FOLDER      FOLDER/runs.json: {name: {"overrides": […], "ds_config": {…}}}

torch's profiler reports every allocation and release of its CPU allocator: exact to the byte, where resident memory is
coarse. Of each phase the second step is measured: the first makes Adam's states, or switches.

It does not see what another thread releases, and gloo's threads may be the last to hold a tensor. So a collective is
waited for until they have let go of it, and the copies that gloo makes for itself are not counted.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from qatscale.config.ds_config import merge_ds_config
from qatscale.config.recipe import load_run_config
from qatscale.engine.initialize import initialize_engine, place_parameters
from qatscale.engine.layout_plan import plan_layout
from qatscale.engine.runtime import Runtime, start_runtime
from qatscale.engine.step import apply_settings, train_step
from qatscale.engine.topology import Topology
from qatscale.engine.zero_masters import ZeroMasters
from qatscale.model.initial_weights import InitialWeights
from qatscale.model.llama import Llama
from qatscale.quant.plugin import QatPlugin
from qatscale.schedule.build import build_timeline

SWITCH, STEPS = 2, 4


def measure(overrides: list[str], ds_config: dict[str, Any], runtime: Runtime) -> dict[str, int]:
    """Bytes: the peak of a step of each phase, by kind what is there between steps, and what the last step sent."""
    config = load_run_config("debug", overrides)
    layout = plan_layout(config, ds_config, runtime.ranks)
    timeline = build_timeline(config)
    topology = Topology(config, layout, runtime)
    rows = config.batch.sequences // layout.data
    batch = torch.randint(config.model.vocab_size, (rows, config.data.sequence_length + 1))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function("step build"):
            with torch.device("meta"):
                model = Llama(config.model, config.engine.activation_checkpointing, topology.tensor, topology.stage)
                plugin = QatPlugin(config.qat, SWITCH)
                plugin.prepare(model)
            merged = merge_ds_config(config, ds_config, layout.data)
            weights = InitialWeights(config.model, config.seed)
            place_parameters(model, weights, merged, topology, runtime.device, draw=True)
            engine, masters = initialize_engine(model, plugin, config, merged, topology)
        for step in range(STEPS):
            plugin.maybe_switch(step, masters)
            apply_settings(engine, timeline.at(step))
            Sent.total = 0.0
            with record_function(f"step {step}"):
                for loss in train_step(engine, batch, config.batch.micro_batch, topology):
                    loss.detach()
                del loss
    found = resident(engine, masters) | peaks(profiler) | {"sent": round(Sent.total)}
    engine.destroy()
    return found


def peaks(profiler: Any) -> dict[str, int]:
    events, unseen = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while unseen:
        events.append(unseen.pop())
        unseen += events[-1].children
    steps = {e.name: (e.start_time_ns, e.end_time_ns) for e in events if e.name.startswith("step ")}
    totals: list[tuple[int, int]] = []
    live: dict[int, int] = {}
    total = 0
    for event in sorted((e for e in events if e.typed[0].name == "Allocation"), key=lambda e: e.start_time_ns):
        pointer, size = event.typed[1].ptr, event.typed[1].alloc_size
        total -= live.pop(pointer, 0)  # also where its release was not seen and the place is taken again
        if size > 0 and not (event.parent and _is_gloos(event.parent)):
            live[pointer] = size
            total += size
        totals.append((event.start_time_ns, total))

    def peak(name: str) -> int:
        start, end = steps[name]
        return max(total for at, total in totals if start <= at <= end)

    return {"start": peak("step build"), "fp": peak(f"step {SWITCH - 1}"), "qat": peak(f"step {STEPS - 1}")}


def _is_gloos(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(("c10d::", "gloo:")):
            return True
        event = event.parent
    return False


class Sent:
    """Bytes that this process sends through `torch.distributed`, collectives counted as rings send them."""

    total = 0.0

    @classmethod
    def count(cls, name: str, tensors: list[Tensor], group: Any) -> None:
        processes = torch.distributed.get_world_size(group)
        whole = max(map(_bytes, tensors))  # of an all-gather the output, of a reduce-scatter the input
        rings = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}.get(name, 0)
        cls.total += whole if name == "send" else rings * whole * (processes - 1) / processes


def watch_collectives() -> None:
    """Count what they send, and let them return when no thread of gloo holds their tensors any more. To be called
    before DeepSpeed is imported."""
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "send", "recv"):
        setattr(torch.distributed, name, _watched(name, getattr(torch.distributed, name)))


def _watched(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        Sent.count(name, tensors, kwargs.get("group"))
        before = [tensor._use_count() for tensor in tensors]
        work = collective(*args, **kwargs)
        if work is None:
            until = time.monotonic() + 20
            while time.monotonic() < until and any(
                tensor._use_count() > count for tensor, count in zip(tensors, before, strict=True)
            ):
                time.sleep(1e-4)
        return work

    return run


def resident(engine: Any, masters: ZeroMasters) -> dict[str, int]:
    """Bytes of the tensors that hold weights, gradients, optimizer states and scales between steps."""
    found = dict.fromkeys(("weights", "scales", "optimizer", "gradients"), 0)
    flat: dict[int, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        is_scale = name.endswith("weight_scale")
        if masters.stage == 3:  # a shard of every one, and the small ones whole
            gathered = (
                parameter.numel() == parameter.ds_numel and parameter.data_ptr() != parameter.ds_tensor.data_ptr()
            )
            whole = parameter.numel() if gathered else 0
            found["scales" if is_scale else "weights"] += _bytes(parameter.ds_tensor) + whole * parameter.element_size()
            found["scales" if is_scale else "gradients"] += 4 * parameter.ds_tensor.numel()
        elif parameter.untyped_storage().data_ptr() not in flat:  # views of their optimizer group, padded
            flat[parameter.untyped_storage().data_ptr()] = parameter
            found["scales" if is_scale else "weights"] += parameter.untyped_storage().nbytes()
    for partition, fragments in masters.by_partition().items():
        state = masters.adam_state(partition)
        of = "scales" if fragments[0].name.endswith("weight_scale") else "optimizer"
        found[of] += sum(map(_bytes, (partition, state["exp_avg"], state["exp_avg_sq"])))
    groups = zip(masters.adam.param_groups, getattr(masters.zero, "fp32_groups_gradients_flat", ()), strict=False)
    for group, gradient in groups:
        found["scales" if group["name"].startswith("scales") else "gradients"] += _bytes(gradient)
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    watch_collectives()
    runtime = start_runtime()
    gc.freeze()
    runs = json.loads((folder / "runs.json").read_text())
    found = {name: measure(run["overrides"], run["ds_config"], runtime) for name, run in runs.items()}
    (folder / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
