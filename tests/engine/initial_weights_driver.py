"""Builds the engines of several layouts and compares their masters with the weights of one process, bit for bit.

python initial_weights_driver.py      (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from qatscale.config.ds_config import merge_ds_config
from qatscale.config.recipe import load_run_config
from qatscale.engine.layout_plan import plan_layout
from qatscale.engine.runtime import Runtime, start_runtime
from qatscale.model.initial_weights import initialise
from qatscale.model.llama import Llama
from qatscale.train.setup import assemble

LAYOUTS = {
    1: ["z1 fp32", "z3 bf16"],
    3: ["z1 fp32", "z2 bf16", "z3 fp32"],  # sizes that three processes cannot divide
    4: ["z1 bf16", "z3 bf16", "z3 fp32 tp2", "z2 fp32 tp2", "z1 bf16 tp4", "z1 fp32 pp2", "z1 bf16 pp2 tp2"],
}  # fmt: skip
SHAPE = [
    "batch.sequences=12", "model.layers=4", "model.vocab_size=515", "model.attention_bias=true", "qat.bits=2",
    "model.heads=4", "model.kv_heads=4", "model.hidden_size=72", "seed=3",
]  # fmt: skip


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check(layout: str, version: int, runtime: Runtime) -> None:
    stage, precision, *parallel = layout.split()
    split = {"tp": 1, "pp": 1} | {name[:2]: int(name[2:]) for name in parallel}
    config = load_run_config("debug", [
        *SHAPE, f"init={version}", f"engine.tensor_parallel={split['tp']}", f"engine.pipeline_stages={split['pp']}",
    ])  # fmt: skip
    zero = {"stage": int(stage[1]), "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    ds: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}}
    alone = Llama(config.model)
    initialise(alone, config.seed, config.init)
    expected = {name: p.detach().to(DTYPES[precision]).float() for name, p in alone.named_parameters()}
    plan = plan_layout(config, ds, runtime.ranks)
    for draw in (True,) if parallel else (True, False):
        with contextlib.redirect_stdout(io.StringIO()):
            built = assemble(config, plan, merge_ds_config(config, ds, plan.data), runtime, 2, draw=draw)
        scales = 0
        for parameter in built.engine.module.parameters():
            name, master = built.masters.names[id(parameter)], built.masters.full(parameter)
            if name.endswith("weight_scale"):
                scales += 1
                assert master.eq(1).all(), (layout, name)
            elif draw or master.ndim == 1:
                assert torch.equal(master, expected[name]), (layout, name)
            else:
                assert master.eq(0).all(), (layout, name)
        assert scales
        built.engine.destroy()


def main(runtime: Runtime) -> None:
    for layout in LAYOUTS[runtime.ranks]:
        check(layout, 2, runtime)
    check(LAYOUTS[runtime.ranks][len(LAYOUTS[runtime.ranks]) // 2 - 1], 1, runtime)


if __name__ == "__main__":
    runtime = start_runtime()
    main(runtime)
    print("RANK", runtime.rank, "ok")
