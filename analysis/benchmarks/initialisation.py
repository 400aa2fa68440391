"""What it takes to give a model its initial weights: CPU seconds, and the memory of a start.

    python analysis/benchmarks/initialisation.py draw [--recipe 396m]      one process, both generators
    python analysis/benchmarks/initialisation.py start [--recipe 759m] [--processes 4]
    python analysis/benchmarks/initialisation.py share [--recipe 8b] [--processes 1024]

`draw` fills a model as versions before `init: 2` did (a constructor's draws, then the generator's, undivided and in
fp32) and as this one does (one process, bf16). `start` builds the model under ZeRO-3 in bf16 on CPU processes and takes
one step. The sum of their peaks, pages that they share counted once, may not be above 18 bytes a parameter, one block
each and their interpreters. `share` builds one process's share as if it were one of many: torch's fake process group
stands for the others. Each part ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"
SYSTEM = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3, "reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000,
        "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 30_000_000, "sub_group_size": 1_000_000,
    },
}  # fmt: skip
"""Buckets smaller than a matrix. The optimizer copies the gradients of one sub-group at a time, by default all."""
TOKENS = 16
"""A sequence: activations are not what is measured."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
"""glibc gives tensors back to the system as they are freed. By default it learns from freed tensors to keep all up to
32 MB: 11 bytes a parameter of 86m after a step."""


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_beside_others() -> int:
    """Bytes; of pages that several processes have mapped, this one's part. Collective."""
    import torch

    torch.distributed.barrier()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value) for name, value, *_ in map(str.split, lines)}
    torch.distributed.barrier()
    return peak() - 1024 * (kib["Rss:"] - kib["Pss:"])


def draw(recipe: str) -> None:
    """Each way in a process of its own, whose peak is its own."""
    import torch

    from qatscale.config.recipe import load_run_config
    from qatscale.config.sizes import count_parameters
    from qatscale.model.initial_weights import InitialWeights, initialise
    from qatscale.model.llama import Llama

    config = load_run_config(recipe)
    count = count_parameters(config.model)
    for version in (1, 2):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        before, began = peak(), time.process_time()
        if version == 1:
            model = Llama(config.model)
            built = time.process_time()
            initialise(model, 0, version=1)
        else:
            with torch.device("meta"):
                model = Llama(config.model)
            model.to(torch.bfloat16).to_empty(device="cpu")
            built = time.process_time()
            weights = InitialWeights(config.model, 0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    weights.fill(parameter, name)
        ended = time.process_time()
        found = {
            "init": version, "recipe": recipe, "parameters": count, "constructor s": built - began,
            "draws s": ended - built, "CPU s per 1e9": (ended - began) / count * 1e9,
            "peak bytes a parameter": (peak() - before) / count,
        }  # fmt: skip
        print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in found.items()}), flush=True)
        os._exit(0)


def build(recipe: str, processes: int, runtime: Any) -> dict[str, Any]:
    """This process's share under ZeRO-3, and one step where the others are real."""
    import torch

    from qatscale.config.ds_config import merge_ds_config
    from qatscale.config.recipe import load_run_config
    from qatscale.config.sizes import count_parameters
    from qatscale.engine.layout_plan import plan_layout
    from qatscale.engine.step import train_step
    from qatscale.train.setup import assemble

    interpreter = peak_beside_others()
    overrides = [f"batch.sequences={processes}", "batch.micro_batch=1", f"data.sequence_length={TOKENS}"]
    config = load_run_config(recipe, overrides)
    layout = plan_layout(config, SYSTEM, processes)
    began, worked = time.perf_counter(), time.process_time()
    built = assemble(config, layout, merge_ds_config(config, SYSTEM, layout.data), runtime, config.steps // 2)
    found: dict[str, Any] = {
        "interpreter": interpreter, "built": peak_beside_others(), "CPU s": time.process_time() - worked,
        "s": time.perf_counter() - began, "parameters": count_parameters(config.model),
        "held": sum(fragment.numel for fragment in built.masters.fragments),
        "largest": max(shape.numel() for shape in built.masters.shapes.values()),
    }  # fmt: skip
    if torch.distributed.get_backend() == "gloo":
        generator = torch.Generator().manual_seed(runtime.rank)
        tokens = torch.randint(config.model.vocab_size, (1, TOKENS + 1), generator=generator)
        (loss,) = train_step(built.engine, tokens, 1, built.topology)
        zero = built.engine.optimizer
        states = [value for state in built.masters.adam.state.values() for value in state.values()]
        held = {
            "weights": [zero.lp_param_buffer], "masters": zero.fp32_partitioned_groups_flat, "Adam": states,
            "gradients": [zero.grad_partitions_flat_buffer], "bucket": [b.buffer for b in zero.ipg_buckets.values()],
        }  # fmt: skip
        kinds = {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in held.items()}
        found |= {"loss": float(loss.detach()), "stepped": peak_beside_others(), "kinds": kinds}
    return found


def worker(recipe: str, processes: int) -> None:
    from qatscale.engine.runtime import start_runtime

    print(json.dumps(build(recipe, processes, start_runtime())), flush=True)


def start(recipe: str, processes: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = ALLOCATOR | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "worker", "--recipe", recipe, "--processes", str(processes)]
    began = time.perf_counter()
    running = [
        subprocess.Popen(command, env=os.environ | where | {"RANK": str(r), "LOCAL_RANK": str(r)}, text=True,
                         stdout=subprocess.PIPE)
        for r in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in running]
    ranks = [json.loads(output.splitlines()[-1]) for output in outputs]
    count, interpreters = ranks[0]["parameters"], sum(rank["interpreter"] for rank in ranks)
    allowed = 18 * count + processes * 2 * ranks[0]["largest"] + interpreters
    together, stepped = (sum(rank[when] for rank in ranks) for when in ("built", "stepped"))
    kinds = {kind: sum(rank["kinds"][kind] for rank in ranks) / count for kind in ranks[0]["kinds"]}
    found = {
        "recipe": recipe, "processes": processes, "parameters": count, "built GB": together / 1e9,
        "allowed GB": allowed / 1e9, "interpreters GB": interpreters / 1e9,
        "with a step GB": stepped / 1e9,
        "bytes a parameter beside interpreters": (together - interpreters) / count,
        "with a step": (stepped - interpreters) / count, "tensors after it, bytes a parameter": kinds,
        "CPU s of a process to build": [round(rank["CPU s"], 1) for rank in ranks],
        "s in all": round(time.perf_counter() - began, 1), "losses": [rank["loss"] for rank in ranks],
    }  # fmt: skip
    print(json.dumps(found))
    sys.exit(max(together, stepped) > allowed)


def share(recipe: str, processes: int) -> None:
    """The last process but a few of so many."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from qatscale.engine.runtime import Runtime, _import_deepspeed_quietly

    _import_deepspeed_quietly()
    import deepspeed

    rank = processes - processes // 40 - 1
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": "0"}
    torch.distributed.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = build(recipe, processes, Runtime(rank, processes, torch.device("cpu")))
    print(json.dumps({"recipe": recipe, "processes": processes, "rank": rank, **found}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("draw", "start", "share", "worker"))
    parser.add_argument("--recipe")
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    if options.part == "draw":
        draw(options.recipe or "396m")
    else:
        recipe, processes = {"share": ("8b", 1024)}.get(options.part, ("759m", 4))
        part = {"start": start, "share": share, "worker": worker}[options.part]
        part(options.recipe or recipe, options.processes or processes)
