"""What a run would need on a job of some size, without any of its GPUs: memory, traffic, bubble, speed.

The estimate is for the process that needs most, in the phase that needs most. `refuse_what_cannot_fit` compares it with
a known device; an unknown one is not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qatscale.config import ds_config_names, load_ds_config, merge_ds_config, precision_of
from qatscale.config.schema import RunConfig
from qatscale.engine.dry_run.ledger import ON_DEVICE, Kind
from qatscale.engine.dry_run.replay import Step, start_bytes
from qatscale.engine.dry_run.share import share_of
from qatscale.engine.dry_run.traffic import traffic
from qatscale.engine.dry_run.zero_plan import zero_plan
from qatscale.engine.layout import Layout, bubble, layout_notices, plan_layout, stages_of
from qatscale.errors import UserError, UserErrors
from qatscale.model.sizes import device_memory, device_names, flops_per_token, peak_flops

Phase = Literal["fp", "qat"]


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a process of one stage at the fullest moment of a step, and before the first."""

    stage: int
    phase: Phase
    moment: str
    kinds: dict[Kind, int]
    start: int
    """While the model is on the device as it was built, whole and in fp32."""

    @property
    def step(self) -> int:
        """On the device."""
        return sum(self.kinds[kind] for kind in ON_DEVICE)

    @property
    def total(self) -> int:
        return max(self.step, self.start)

    @property
    def when(self) -> str:
        """Of the total."""
        return f"{self.moment}, {self.phase}" if self.step >= self.start else "start"


@dataclass(frozen=True)
class ScalePlan:
    layout: Layout
    zero_stage: int
    precision: Literal["fp32", "bf16"]
    micro_batches: int
    stages: tuple[StageMemory, ...]
    """Of every stage its fuller phase."""
    traffic: dict[str, int]
    """Kind → bytes that a process sends a step, in the last phase."""
    bubble: float
    notices: tuple[str, ...]
    gpu: str | None
    gpu_memory: int | None
    mfu: float | None
    tokens_per_second: float | None
    """Of the whole job; None without a device and an MFU."""
    step_seconds: float | None

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool | None:
        """None: not compared."""
        return None if self.gpu_memory is None else self.fullest.total <= self.gpu_memory


def plan_scale(
    config: RunConfig,
    ds_config: Mapping[str, Any],
    processes: int,
    gpu: str | None = None,
    mfu: float | None = None,
) -> ScalePlan:
    """UserError for a layout that cannot work, a batch that does not divide, a device without known numbers.

    mfu: the share of the device's bf16 peak that a stage reaches while it works; the bubble comes on top.
    """
    layout = plan_layout(config, ds_config, processes)
    merge_ds_config(config, ds_config, layout.data)  # refuses a batch that does not divide
    plan, precision = zero_plan(ds_config, layout.data), precision_of(ds_config)
    phases = _phases(config)
    stages = []
    for stage in stages_of(config):
        share = share_of(config, layout, stage)
        found = []
        for phase in phases:
            ledger = Step(config, layout, share, plan, quantized=phase == "qat").replay()
            found.append(StageMemory(stage.index, phase, ledger.peak_at, ledger.peak, start_bytes(share, plan)))
        stages.append(max(found, key=lambda memory: memory.step))
    micro_batches = config.batch.sequences // (config.batch.micro_batch * layout.data)
    share_waiting = bubble(micro_batches, layout.pipeline)
    speed = _speed(config, processes, gpu, mfu, precision, share_waiting)
    return ScalePlan(
        layout=layout,
        zero_stage=plan.stage,
        precision=precision,
        micro_batches=micro_batches,
        stages=tuple(stages),
        traffic=traffic(config, layout, plan, quantized=phases[-1] == "qat"),
        bubble=share_waiting,
        notices=layout_notices(config, layout),
        gpu=gpu,
        gpu_memory=device_memory(gpu) if gpu else None,
        mfu=mfu,
        tokens_per_second=speed,
        step_seconds=config.tokens_per_step / speed if speed else None,
    )


def _phases(config: RunConfig) -> tuple[Phase, ...]:
    return {"fp": ("fp",), "scratch": ("qat",)}.get(config.qat.scheme, ("fp", "qat"))  # type: ignore[return-value]


def _speed(
    config: RunConfig, processes: int, gpu: str | None, mfu: float | None, precision: str, share_waiting: float
) -> float | None:
    """Tokens/s of the job: MFU x peak over the FLOPs of a token, less the bubble."""
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError("--mfu", mfu, "a share of the device's peak, above 0 and at most 1, e.g. 0.4.")
    if mfu is not None and gpu is None:
        raise UserError("--mfu", mfu, "is a share of a device's peak.", "Name the device with --gpu.")
    if gpu is None:
        return None
    peak = peak_flops(gpu)
    if peak is None:
        known = ", ".join(device_names())
        raise UserError(
            "--gpu", gpu, "its peak and memory are not known here, and are not guessed.", f"Known: {known}."
        )
    if mfu is None:
        return None
    if precision == "fp32":
        raise UserError("--mfu", mfu, "is of the bf16 peak, and the ds_config computes in fp32.", "Take a bf16 one.")
    per_token = flops_per_token(config.model, config.data.sequence_length)
    return mfu * peak * processes / per_token * (1 - share_waiting)


def refuse_what_cannot_fit(config: RunConfig, ds_config: Mapping[str, Any], plan: ScalePlan) -> None:
    """UserError where the fullest process needs more than the device has, with what would fit instead."""
    if plan.fits is not False:
        return
    assert plan.gpu is not None
    assert plan.gpu_memory is not None
    fullest = plan.fullest
    needs = f"a process of stage {fullest.stage} needs" if plan.layout.pipeline > 1 else "a process needs"
    fitting = [f"{change} ({_gigabytes(size)})" for change, size in _alternatives(config, ds_config, plan)]
    do = (
        f"Would fit: {'; '.join(fitting)}." if fitting else "No single change fits: combine several, or take more GPUs."
    )
    raise UserError(
        "--gpu", plan.gpu,
        f"has {_gigabytes(plan.gpu_memory)}; {needs} {_gigabytes(fullest.total)} ({fullest.when}).",
        do,
    )  # fmt: skip


def _alternatives(config: RunConfig, ds_config: Mapping[str, Any], plan: ScalePlan) -> Iterator[tuple[str, int]]:
    """(one change to the run, its bytes), of those that fit."""
    processes = plan.layout.processes
    candidates: list[tuple[str, RunConfig, Mapping[str, Any], int]] = []

    def vary(change: str, section: str, key: str, value: object) -> None:
        part = getattr(config, section).model_copy(update={key: value})
        candidates.append((change, config.model_copy(update={section: part}), ds_config, processes))

    if not config.engine.activation_checkpointing:
        vary("engine.activation_checkpointing=true", "engine", "activation_checkpointing", True)
    if config.batch.micro_batch > 1:
        smaller = config.batch.micro_batch // 2
        vary(f"batch.micro_batch={smaller}", "batch", "micro_batch", smaller)
    for name in ds_config_names():
        other = load_ds_config(name)
        more = (
            other["zero_optimization"]["stage"] > plan.zero_stage or "offload_optimizer" in other["zero_optimization"]
        )
        if more and precision_of(other) == plan.precision:
            candidates.append((f"engine.ds_config={name}", config, other, processes))
    vary(f"engine.tensor_parallel={2 * plan.layout.tensor}", "engine", "tensor_parallel", 2 * plan.layout.tensor)
    candidates.append((f"--processes {2 * processes}", config, ds_config, 2 * processes))
    for change, changed, ds, wanted in candidates:
        try:
            other_plan = plan_scale(changed, ds, wanted, plan.gpu)
        except (UserError, UserErrors):
            continue
        if other_plan.fits:
            yield change, other_plan.fullest.total


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
