"""Layouts whose memory is estimated and measured. `python -m tests.engine.estimate.memory_layouts FOLDER` compares the
two; what FOLDER/measured.json holds is not measured again."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatscale.config.recipe import load_run_config
from qatscale.engine.estimate.local_sizes import LocalSizes
from qatscale.engine.estimate.memory import Kinds, ZeroSettings, fullest_moment
from qatscale.engine.layout import Layout, stages_of
from qatscale.engine.layout_plan import plan_layout
from tests.processes import run

DRIVER = Path(__file__).with_name("memory_driver.py")
BASE = [
    "model.hidden_size=128", "model.layers=3", "model.heads=4", "model.intermediate_size=320", "model.vocab_size=1500",
    "data.sequence_length=72", "batch.sequences=4", "batch.micro_batch=2", "tokens=11520", "qat.scheme=fused",
    "qat.bits=4", "qat.fraction=0.5", "log_interval=1",
]  # fmt: skip
"""Weights and activations are of like size, so that neither could be wrong unseen. No size divides another."""


@dataclass(frozen=True)
class Run:
    processes: int
    overrides: tuple[str, ...]
    ds_config: dict[str, Any]

    @property
    def all_overrides(self) -> list[str]:
        return [*BASE, *self.overrides]


def _ds(stage: int, precision: str, **zero: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"reduce_bucket_size": 150_000, "allgather_bucket_size": 150_000}
    if stage == 3:
        sizes = {"reduce_bucket_size": 150_000, "stage3_param_persistence_threshold": 1000}
    return {"zero_optimization": {"stage": stage, **sizes, **zero}} | (
        {"bf16": {"enabled": True}} if precision == "bf16" else {}
    )


_TENSOR, _SEQUENCE = ("engine.tensor_parallel=2",), ("engine.tensor_parallel=2", "engine.sequence_parallel=true")
_PIPELINE, _RECOMPUTE = ("engine.pipeline_stages=2",), ("engine.activation_checkpointing=true",)
_TWO_PASSES = ("batch.sequences=8",)
"""Of two data-parallel processes; else each would have one micro-batch."""

RUNS = {
    "1 process, ZeRO-1 fp32": Run(1, (), _ds(1, "fp32")),
    "1 process, ZeRO-2 bf16, recomputed": Run(1, _RECOMPUTE, _ds(2, "bf16")),
    "1 process, ZeRO-1 bf16, untied, groups of 32": Run(
        1, ("model.tied_embedding=false", "qat.group_size=32", "model.kv_heads=2"), _ds(1, "bf16")
    ),
    "2 data, ZeRO-1 bf16": Run(2, _TWO_PASSES, _ds(1, "bf16")),
    "2 data, ZeRO-2 fp32": Run(2, _TWO_PASSES, _ds(2, "fp32")),
    "2 data, ZeRO-2 bf16": Run(2, _TWO_PASSES, _ds(2, "bf16")),
    "2 data, ZeRO-3 bf16": Run(2, _TWO_PASSES, _ds(3, "bf16")),
    "2 data, ZeRO-3 bf16, prefetching one, recomputed": Run(
        2, _RECOMPUTE, _ds(3, "bf16", stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=1)
    ),
    "2 tensor, ZeRO-1 fp32": Run(2, _TENSOR, _ds(1, "fp32")),
    "2 tensor + sequence, ZeRO-2 bf16": Run(2, _SEQUENCE, _ds(2, "bf16")),
    "2 stages, ZeRO-1 fp32": Run(2, (*_PIPELINE, "batch.sequences=6"), _ds(1, "fp32")),
    "2 stages, ZeRO-1 bf16, untied, recomputed": Run(
        2, (*_PIPELINE, *_RECOMPUTE, "model.tied_embedding=false"), _ds(1, "bf16")
    ),
}
"""Those of the suite."""
MORE = {
    "1 process, ZeRO-1 bf16": Run(1, (), _ds(1, "bf16")),
    "1 process, ZeRO-3 fp32, recomputed": Run(1, _RECOMPUTE, _ds(3, "fp32")),
    "2 data, ZeRO-1 fp32": Run(2, _TWO_PASSES, _ds(1, "fp32")),
    "2 data, ZeRO-1 bf16, recomputed": Run(2, (*_TWO_PASSES, *_RECOMPUTE), _ds(1, "bf16")),
    "2 data, ZeRO-2 fp32, one micro-batch": Run(2, (), _ds(2, "fp32")),
    "2 data, ZeRO-2 bf16, a bucket less than a matrix": Run(2, _TWO_PASSES, _ds(2, "bf16", reduce_bucket_size=30_000)),
    "2 data, ZeRO-2 bf16, overlapping": Run(2, _TWO_PASSES, _ds(2, "bf16", overlap_comm=True)),
    "2 data, ZeRO-2 bf16, not contiguous": Run(2, _TWO_PASSES, _ds(2, "bf16", contiguous_gradients=False)),
    "2 data, ZeRO-2 bf16, offload": Run(2, _TWO_PASSES, _ds(2, "bf16", offload_optimizer={"device": "cpu"})),
    "2 data, ZeRO-3 fp32": Run(2, _TWO_PASSES, _ds(3, "fp32")),
    "2 tensor, ZeRO-1 bf16": Run(2, _TENSOR, _ds(1, "bf16")),
    "2 tensor, ZeRO-3 bf16": Run(2, _TENSOR, _ds(3, "bf16")),
    "2 tensor + sequence, ZeRO-1 bf16, recomputed": Run(2, (*_SEQUENCE, *_RECOMPUTE), _ds(1, "bf16")),
    "2 tensor + sequence, ZeRO-3 fp32": Run(2, _SEQUENCE, _ds(3, "fp32")),
    "2 stages, ZeRO-1 bf16": Run(2, _PIPELINE, _ds(1, "bf16")),
    "2 stages, ZeRO-1 fp32, recomputed": Run(2, (*_PIPELINE, *_RECOMPUTE), _ds(1, "fp32")),
}
"""Those of the record only: each costs seconds."""


def sizes_of(of: Run) -> list[LocalSizes]:
    """What a process of each stage holds."""
    config, layout = load_run_config("debug", of.all_overrides), layout_of(of)
    return [LocalSizes(config, layout, stage) for stage in stages_of(config)]


def estimate(of: Run, stage: int, phase: str) -> tuple[str, Kinds]:
    """(moment, bytes by kind) with the kernels of CPU, where what is offloaded is in the same memory."""
    zero = ZeroSettings(of.ds_config, layout_of(of).data)
    return fullest_moment(sizes_of(of)[stage], zero, quantized=phase == "qat", device="cpu")


def layout_of(of: Run) -> Layout:
    return plan_layout(load_run_config("debug", of.all_overrides), of.ds_config, of.processes)


def measure(folder: Path, runs: dict[str, Run]) -> dict[str, list[dict[str, int]]]:
    """Run → what each rank measured."""
    measured: dict[str, list[dict[str, int]]] = {}
    for processes in (1, 2):
        there = folder / f"{processes}"
        there.mkdir(parents=True)
        wanted = {name: of for name, of in runs.items() if of.processes == processes}
        specs = {name: {"overrides": of.all_overrides, "ds_config": of.ds_config} for name, of in wanted.items()}
        (there / "runs.json").write_text(json.dumps(specs))
        finished = run([DRIVER, there], processes, timeout=900)
        assert finished.codes == [0] * processes, finished.output
        ranks = [json.loads((there / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        measured |= {name: [rank[name] for rank in ranks] for name in wanted}
    return measured


def fullest(ranks: list[dict[str, int]], of: Run, stage: int, what: str) -> int:
    """The most that a process of a stage measured."""
    layout = layout_of(of)
    return max(found[what] for rank, found in enumerate(ranks) if layout.place(rank).stage == stage)


def table(measured: dict[str, list[dict[str, int]]]) -> str:
    """Markdown, and the errors in all."""
    lines = [
        "| layout | stage | phase | measured, bytes | estimate, bytes | error | most at |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    errors = []
    for name, ranks in measured.items():
        of = (RUNS | MORE)[name]
        for stage in range(layout_of(of).pipeline):
            for phase in ("fp", "qat"):
                moment, kinds = estimate(of, stage, phase)
                found, total = fullest(ranks, of, stage, phase), sum(kinds.values())
                errors.append(total / found - 1)
                shown = f"{found:,} | {total:,} | {errors[-1]:+.1%} | {moment}"
                lines.append(f"| {name} | {stage} | {phase} | {shown} |")
    sizes = sorted(map(abs, errors))
    lines.append(f"\n{len(sizes)} rows: largest {sizes[-1]:.1%}, median {statistics.median(sizes):.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    kept = Path(sys.argv[1]) / "measured.json"
    if not kept.exists():
        kept.write_text(json.dumps(measure(kept.parent, RUNS | MORE)))
    print(table(json.loads(kept.read_text())))
