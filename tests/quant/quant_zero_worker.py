"""One process of the ZeRO-3 test: trains the small model with QAT on and writes its losses.

python quant_zero_worker.py RESULT_FILE   (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from qatscale.config.schema import QatConfig
from qatscale.quant.plugin import PlainMasters, QatPlugin, scale_groups, view
from tests.quant.quant_models import TinyModel, a_batch

STEPS = 3


def switched_model() -> tuple[TinyModel, list[dict[str, object]]]:
    """With activation checkpointing and a tied embedding; QAT on before the engine is built."""
    model = TinyModel(recompute=True)
    plugin = QatPlugin(QatConfig(scheme="scratch", bits=2, group_size=16), 0)
    plugin.prepare(model)
    plugin.maybe_switch(0, PlainMasters(torch.optim.AdamW(model.parameters())))
    of_scales = [p for group in scale_groups(model).values() for p in group]
    ids = {id(p) for p in of_scales}
    weights = [p for p in model.parameters() if id(p) not in ids]
    return model, [{"params": weights}, {"params": of_scales, "weight_decay": 0.0}]


def batches(step: int, ranks: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [a_batch(seed=10 * step + rank) for rank in range(ranks)]


def optimizer_of(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


@torch.no_grad()
def views(model: torch.nn.Module, inner: torch.nn.Module) -> list[float]:
    found = [model(*a_batch(seed=99)).item()]
    for kind, bits in (("fp", None), ("ptq", 3)):
        with view(inner, kind, bits):
            found.append(model(*a_batch(seed=99)).item())
    return found


def main() -> None:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    result, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    deepspeed.init_distributed("gloo", verbose=False)
    model, groups = switched_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(groups),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    assert model.blocks[0].mlp.up.weight.shape == (0,), "weights are partitioned outside of forward"
    assert model.blocks[0].mlp.up.weight_scale.shape == (0,)
    losses = []
    for step in range(STEPS):
        loss = engine(*batches(step)[rank])
        engine.backward(loss)
        engine.step()
        torch.distributed.all_reduce(total := loss.detach().clone())
        losses.append(total.item() / 2)
    found = {"losses": losses, "views": views(engine, model)}
    if rank == 0:
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
