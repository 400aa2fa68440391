"""torch.compile for the training step: which parts, when, and how often it happened.

The compiled part is the function that runs one block. Blocks are alike, so all of them share its one graph, and the
modules stay what they are: names, hooks and state dicts do not change. The shapes are fixed; validation, whose last
batch may be smaller, is not compiled, and so gives what `qatscale evaluate` gives. The switch to QAT changes what a
block computes and compiles it once more.

Under activation checkpointing a block is recomputed by the same graph. A pipeline stage compiles its blocks by itself.
Under tensor parallelism the exchanges lie between graphs: they are autograd Functions around collectives that write in
place, which the compiler does not accept; a block then is a dozen graphs, and blocks still share them. Under ZeRO-3 a
block cannot be compiled: DeepSpeed gathers every weight in a hook, each of which ends a graph, and the graphs of one
block and the next differ until the compiler gives up. There, and by default under tensor parallelism, the parts without
weights are compiled: the rotation, SiLU(gate)·up, and the loss of a chunk. The switch does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from qatscale.config.schema import EngineConfig
from qatscale.engine.runtime import uses_gpu
from qatscale.errors import UserError
from qatscale.model import documents
from qatscale.model.head import fusible_chunk_loss
from qatscale.model.llama import Llama, gated, rotate, run_block
from qatscale.model.tensor_parallel import keep_out_of_graphs

Plan = Literal["off", "parts", "on"]
"""`on`: the blocks. `parts`: what has no weights."""


def plan_compilation(engine: EngineConfig, ds_config: Mapping[str, Any]) -> Plan:
    """What this process compiles. UserError where it was asked for and cannot be.

    `auto` is for GPUs: on two CPU cores compiling takes longer than a small run gains (analysis/benchmarks/
    step_speed.md). Under tensor parallelism blocks were tested and never timed: `auto` leaves them out.
    """
    setting, sharded = engine.compile, ds_config["zero_optimization"]["stage"] == 3
    if setting == "off" or (setting == "auto" and not (uses_gpu() and _has_triton())):
        return "off"
    if uses_gpu() and not _has_triton():
        problem = "needs Triton on this GPU, which is not installed or too old for it."
        raise UserError("engine.compile", setting, problem)
    return "parts" if sharded or (setting == "auto" and engine.tensor_parallel > 1) else "on"


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


class Compilation:
    """Counts the graphs of a model's compiled parts. torch compiles them when they are first run."""

    def __init__(self, model: Llama, plan: Plan, backend: str = "inductor") -> None:
        """plan: "off" = the model stays as it is. backend: of torch.compile."""
        self._plan = plan
        self._reported = self._begun = None if plan == "off" else self._total()
        if plan == "off":
            return
        if plan == "on":
            if model.parallel.size > 1:
                keep_out_of_graphs()
            if model.document_end is not None:
                documents.keep_out_of_graphs()
            model.run_block = torch.compile(run_block, dynamic=False, backend=backend)
        else:
            model.use_parts(*(_for_training(part, backend) for part in (rotate, gated)))
        if uses_gpu() and model.stage.is_last:  # on CPUs the vectorised softmax is as fast as the compiled one
            model.head.chunk_loss = torch.compile(fusible_chunk_loss, dynamic=False, backend=backend)

    @staticmethod
    def _total() -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def news(self) -> str | None:
        """What was compiled since the last call, for a person."""
        if self._reported is None or (graphs := self._total() - self._reported) == 0:
            return None
        again = "anew " if self._reported != self._begun else ""
        self._reported += graphs
        of = ", the same for all blocks" if self._plan == "on" else " of parts without weights"
        return f"compiled {again}{graphs} graph{'s' if graphs > 1 else ''}{of}"


def _for_training(part: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """`part`, compiled where gradients are taken: the shapes of a validation differ."""
    compiled = torch.compile(part, dynamic=False, backend=backend)
    return lambda *given: (compiled if torch.is_grad_enabled() else part)(*given)
