"""torch.compile for the training step: which parts, when, and how often it happened.

The compiled part is the function that runs one block. Blocks are alike, so all of them share its one graph, and the
modules stay what they are: names, hooks and state dicts do not change. The shapes are fixed; validation, whose last
batch may be smaller, is not compiled, and so gives what `qatscale evaluate` gives. The switch to QAT changes what a
block computes and compiles it once more.

Under activation checkpointing a block is recomputed by the same graph. A pipeline stage compiles its blocks by itself.
Under tensor parallelism the exchanges lie between graphs: they are autograd Functions around collectives that write in
place, which the compiler does not accept; a block then is a dozen graphs, and blocks still share them. Under ZeRO-3
nothing is compiled: DeepSpeed gathers every weight in a hook, each of which ends a graph, and the graphs of one block
and the next differ until the compiler gives up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qatscale.config.schema import EngineConfig
from qatscale.engine.runtime import uses_gpu
from qatscale.errors import UserError
from qatscale.model import documents
from qatscale.model.head import fusible_chunk_loss
from qatscale.model.llama import Llama, run_block
from qatscale.model.tensor_parallel import keep_out_of_graphs


def plan_compilation(engine: EngineConfig, ds_config: Mapping[str, Any]) -> bool:
    """Whether this process compiles. UserError where it was asked for and cannot be.

    `auto` is for GPUs: on two CPU cores compiling takes longer than a small run gains (analysis/benchmarks/
    step_speed.md). It leaves tensor parallelism out, where it was tested and never timed.
    """
    setting, stage = engine.compile, ds_config["zero_optimization"]["stage"]
    if setting == "on" and stage == 3:
        problem = "does not work with ZeRO-3, whose hooks end a graph at every weight."
        raise UserError("engine.compile", setting, problem, "Take a ZeRO-1 or ZeRO-2 ds_config, or engine.compile=off.")
    if setting == "auto":
        return stage < 3 and engine.tensor_parallel == 1 and uses_gpu() and _has_triton()
    if setting == "on" and uses_gpu() and not _has_triton():
        problem = "needs Triton on this GPU, which is not installed or too old for it."
        raise UserError("engine.compile", setting, problem)
    return setting == "on"


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


class Compilation:
    """Counts the graphs of a model's compiled parts. torch compiles them when they are first run."""

    def __init__(self, model: Llama, compiles: bool, backend: str = "inductor") -> None:
        """compiles: False = the model stays as it is. backend: of torch.compile."""
        self._reported = self._total() if compiles else None
        self._begun = self._reported
        if not compiles:
            return
        if model.parallel.size > 1:
            keep_out_of_graphs()
        if model.document_end is not None:
            documents.keep_out_of_graphs()
        model.run_block = torch.compile(run_block, dynamic=False, backend=backend)
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
        return f"compiled {again}{graphs} graph{'s' if graphs > 1 else ''}, the same for all blocks"
