"""torch.compile for the training step: which parts, when, and how often it happened.

What is compiled is the function that runs one block. Blocks are alike, so all of them share its one graph, and the
modules stay what they are: names, hooks and state dicts do not change. The shapes are fixed; validation, whose last
batch may be smaller, runs as it is written, and so gives what `qatscale evaluate` gives. The switch to QAT changes what
a block computes and compiles it once more.

Under activation checkpointing a block is recomputed by the same graph. A pipeline stage compiles its blocks by itself.
Under tensor parallelism the exchanges lie between graphs: they are autograd Functions around collectives that write in
place, which the compiler does not take in; a block then is a dozen graphs, and blocks still share them. Under ZeRO-3
nothing is compiled: DeepSpeed gathers every weight in a hook, each of which ends a graph, and the graphs of one block
and the next differ until the compiler gives up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from qatscale.config.schema import EngineConfig
from qatscale.engine.runtime import uses_gpu
from qatscale.errors import UserError
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
        raise UserError(
            "engine.compile", setting, "does not go with ZeRO-3, whose hooks end a graph at every weight.",
            "Take a ZeRO-1 or ZeRO-2 ds_config, or engine.compile=off.",
        )  # fmt: skip
    if setting == "auto":
        return stage < 3 and engine.tensor_parallel == 1 and uses_gpu() and _has_triton()
    if setting == "on" and uses_gpu() and not _has_triton():
        raise UserError(
            "engine.compile", setting, "needs Triton on this GPU, which is not installed or too old for it."
        )
    return setting == "on"


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


class Compilation:
    """Compiles nothing and has nothing to tell."""

    def news(self) -> str | None:
        """What was compiled since the last call, for a person."""
        return None

    def close(self) -> None:
        """Stop counting."""


class Compiled(Compilation):
    """The compiled parts of a model, and a count of what the compiler did. Compiling happens when they are first run.

    backend: of torch.compile.
    """

    def __init__(self, model: Llama, backend: str = "inductor") -> None:
        import torch._dynamo

        self.graphs = 0
        """Forward graphs made, all told."""
        self.seconds = 0.0
        self._started = self._told_graphs = 0
        self._told_seconds = 0.0
        self._since = 0.0
        torch._dynamo.on_compile_start(self._on_start)
        torch._dynamo.on_compile_end(self._on_end)
        if model.parallel.size > 1:
            keep_out_of_graphs()
        model.run_block = torch.compile(run_block, dynamic=False, backend=backend)
        if uses_gpu() and model.stage.is_last:  # on CPUs the vectorised softmax is as fast as the compiled one
            model.head.chunk_loss = torch.compile(fusible_chunk_loss, dynamic=False, backend=backend)

    def _on_start(self, _: Any = None) -> None:
        self._started += 1
        self._since = time.perf_counter()

    def _on_end(self, what: Any = None) -> None:
        self.seconds += time.perf_counter() - self._since
        if "BACKWARD" not in str(getattr(what, "callback_trigger", "")):  # counted with its forward graph
            self.graphs += 1

    def news(self) -> str | None:
        graphs, seconds = self.graphs - self._told_graphs, self.seconds - self._told_seconds
        if not graphs:
            return None
        first = not self._told_graphs
        self._told_graphs, self._told_seconds = self.graphs, self.seconds
        many = f"{graphs} graph{'s' if graphs > 1 else ''}"
        return f"compiled {'' if first else 'anew '}in {seconds:.0f} s: {many}, the same for all blocks"

    def close(self) -> None:
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._on_start)
        callback_handler.remove_end_callback(self._on_end)
