"""What a run would need on a job of some size, whether it fits, and which single change would help.

The estimate is for the process that needs most, in the phase that needs most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qatscale.config.ds_config import ds_config_names, load_ds_config, merge_ds_config, precision_of
from qatscale.config.problems import together
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import device_memory, device_names, flops_per_token, peak_flops
from qatscale.engine.estimate.local_sizes import LocalSizes
from qatscale.engine.estimate.memory import ON_DEVICE, HostMemory, Kind, ZeroSettings, fullest_moment, start_bytes
from qatscale.engine.estimate.traffic import NetworkTime, Traffic, traffic_of
from qatscale.engine.layout import stages_of
from qatscale.engine.layout_plan import bubble, layout_notices, plan_layout
from qatscale.errors import UserError

Phase = Literal["fp", "qat"]
_WORTH_A_CHANGE = 1.05
"""A step this many times as long as its arithmetic is worth a sentence on the network."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a process of one stage at the fullest moment of a step, and before the first step."""

    stage: int
    phase: Phase
    moment: str
    kinds: dict[Kind, int]
    start: int
    """While the model is built, see `start_bytes`."""

    @property
    def step(self) -> int:
        """On the device."""
        return sum(self.kinds[kind] for kind in ON_DEVICE)

    @property
    def total(self) -> int:
        return max(self.step, self.start)

    @property
    def when(self) -> str:
        """The time at which the total is reached."""
        return f"{self.moment}, {self.phase}" if self.step >= self.start else "start"


@dataclass(frozen=True)
class Given:
    """What a person says about the machines; None = not known."""

    gpu: str | None = None
    mfu: float | None = None
    """The share of the device's bf16 peak that a stage reaches while it works."""
    network: float | None = None
    """GB/s that a process sends over the job's slowest link; None = by the kind of link."""
    host_memory: float | None = None
    """GB of a node."""
    gpu_memory: float | None = None
    """GB of a device, in place of what is known of `gpu`."""
    gpu_peak: float | None = None
    """bf16 FLOP/s of a device, in place of what is known of `gpu`."""

    @property
    def memory(self) -> int | None:
        """Bytes of a device."""
        known = device_memory(self.gpu) if self.gpu else None
        return known if self.gpu_memory is None else round(self.gpu_memory * 1e9)

    @property
    def peak(self) -> float | None:
        """bf16 FLOP/s of a device."""
        return self.gpu_peak or (peak_flops(self.gpu) if self.gpu else None)


class JobEstimate:
    """What a run needs on so many processes.

    UserError for a layout that cannot work, a batch that does not divide, a device without known numbers.
    """

    def __init__(
        self, config: RunConfig, ds_config: Mapping[str, Any], processes: int, given: Given | None = None
    ) -> None:
        self.config, self.ds_config, self.given = config, ds_config, given or Given()
        self.layout = layout = plan_layout(config, ds_config, processes)
        merged = merge_ds_config(config, ds_config, layout.data)
        zero = ZeroSettings(merged, layout.data)
        self.zero_stage, self.precision = zero.stage, precision_of(merged)
        phases: tuple[Phase, ...] = {"fp": ("fp",), "scratch": ("qat",)}.get(config.qat.scheme, ("fp", "qat"))  # type: ignore[assignment]
        local = [LocalSizes(config, layout, stage) for stage in stages_of(config)]
        self.stages: list[StageMemory] = []
        """Each stage in its fuller phase."""
        for sizes in local:
            found = []
            for phase in phases:
                moment, kinds = fullest_moment(sizes, zero, quantized=phase == "qat")
                found.append(StageMemory(sizes.stage.index, phase, moment, kinds, start_bytes(sizes, zero)))
            self.stages.append(max(found, key=lambda memory: memory.step))
        self.host = HostMemory(local, zero)
        traffics = [traffic_of(sizes, zero, quantized=phases[-1] == "qat") for sizes in local]
        busiest = max(traffics, key=lambda sent: sum(sent.values()))
        self.traffic: Traffic = {kind: size for kind, size in busiest.items() if size}
        """Kind → bytes that a process of the busiest stage sends a step, in the last phase."""
        self.micro_batches = config.batch.micro_batches(layout.data)
        self.bubble = bubble(self.micro_batches, layout.pipeline)
        speed = _speed(config, processes, self.given, self.precision)
        self.compute_seconds = config.tokens_per_step / speed / (1 - self.bubble) if speed else None
        """Arithmetic and bubble of a step; None without a device and an MFU."""
        self.network = NetworkTime(
            self.traffic, layout, zero, bandwidth=self.given.network, compute=self.compute_seconds,
            micro_batches=self.micro_batches, recomputes=config.engine.activation_checkpointing,
        )  # fmt: skip
        self.notices = layout_notices(config, layout)
        self.gpu_memory = self.given.memory

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool | None:
        """On the device; None: not compared."""
        return None if self.gpu_memory is None else self.fullest.total <= self.gpu_memory

    @property
    def fits_host(self) -> bool | None:
        return None if self.given.host_memory is None else self.host.total <= self.given.host_memory * 1e9

    @property
    def step_seconds(self) -> float | None:
        if self.compute_seconds is None or self.network.overlapped is None:
            return None
        return self.compute_seconds + self.network.seconds - self.network.overlapped


def _speed(config: RunConfig, processes: int, given: Given, precision: str) -> float | None:
    """Tokens/s of the job while it computes: MFU x peak over the FLOPs of a token."""
    in_gb = {"--network": given.network, "--host-memory": given.host_memory, "--gpu-memory": given.gpu_memory}
    for option, value in in_gb.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(option, value, "a number of GB above 0.")
    mfu, gpu = given.mfu, given.gpu
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError("--mfu", mfu, "a share of the device's peak, above 0 and at most 1, e.g. 0.4.")
    if gpu is not None and (given.peak is None or given.memory is None):
        alike = [name for name in device_names() if gpu.lower() in name.lower()]
        names = f"Which one: {', '.join(alike)}?" if alike else f"Known: {', '.join(device_names())}."
        known = f"{names} Or give its --gpu-memory and --peak-flops."
        raise UserError("--gpu", gpu, "its peak and memory are not known here, and are not guessed.", known)
    if mfu is None:
        return None
    if given.peak is None:
        raise UserError(
            "--mfu", mfu, "is a share of a device's peak.", "Name the device with --gpu, or add --peak-flops."
        )
    if precision == "fp32":
        raise UserError("--mfu", mfu, "is of the bf16 peak, and the ds_config computes in fp32.", "Take a bf16 one.")
    return mfu * given.peak * processes / flops_per_token(config.model, config.data.sequence_length)


# --- what would help ---


def refuse_what_cannot_fit(job: JobEstimate) -> None:
    """UserError where a process needs more than its device has or a node more than its host, with what would fit."""
    problems = []
    if job.fits is False:
        assert job.gpu_memory is not None
        whose = f"a process of stage {job.fullest.stage}" if job.layout.pipeline > 1 else "a process"
        needs = f"{whose} needs {_gigabytes(job.fullest.total)} ({job.fullest.when})"
        fitting = [f"{what} ({_gigabytes(o.fullest.total)})" for what, o in _changes(job) if o.fits]
        problem = f"has {_gigabytes(job.gpu_memory)}; {needs}."
        option = "--gpu" if job.given.gpu else "--gpu-memory"
        problems.append(UserError(option, job.given.gpu or job.given.gpu_memory, problem, _would(fitting)))
    if job.fits_host is False:
        needs = f"a node of {job.host.processes} needs {_gigabytes(job.host.total)} of host memory"
        fitting = [
            f"{what} ({_gigabytes(o.host.total)})" for what, o in _changes(job) if o.fits_host and o.fits is not False
        ]
        problems.append(UserError("--host-memory", f"{job.given.host_memory:g} GB", f"{needs}.", _would(fitting)))
    if problems:
        raise together(problems)


def network_advice(job: JobEstimate) -> str | None:
    """Which change shortens the step most where the network makes it long; None where it does not, or is unknown."""
    if job.step_seconds is None or job.compute_seconds is None:
        return None
    longer = job.step_seconds / job.compute_seconds
    if longer < _WORTH_A_CHANGE:
        return None
    waits = job.network.seconds > job.compute_seconds
    bound = "bound by the network" if waits else f"the network adds {longer - 1:.0%}"
    same_arithmetic = ("batch.micro_batch", "engine.ds_config", "zero_optimization")
    shorter = [
        (other.step_seconds, what, other)
        for what, other in _changes(job)
        if what.startswith(same_arithmetic) and other.fits and other.step_seconds and not other.host.offloaded
    ]
    if not shorter or min(shorter)[0] > job.step_seconds / _WORTH_A_CHANGE:
        return f"{bound}: no batch.micro_batch, engine.ds_config or overlap that fits shortens the step by 5 %"
    seconds, what, other = min(shorter)
    less = sum(job.traffic.values()) / max(1, sum(other.traffic.values()))
    sends = f"sends {less:,.2g} x less" if less > 1.1 else "hides what it sends behind the arithmetic"
    return f"{bound}: {what} fits and {sends}, {seconds:,.3g} s a step"


def _changes(job: JobEstimate) -> Iterator[tuple[str, JobEstimate]]:
    """(one change to the run, its estimate), of those that can work."""
    config, ds_config = job.config, job.ds_config
    processes, micro = job.layout.processes, config.batch.micro_batch
    candidates: list[tuple[str, RunConfig, Mapping[str, Any], int]] = []

    def vary(section: str, key: str, value: object) -> None:
        part = getattr(config, section).model_copy(update={key: value})
        change = f"{section}.{key}={str(value).lower()}"
        candidates.append((change, config.model_copy(update={section: part}), ds_config, processes))

    if not config.engine.activation_checkpointing:
        vary("engine", "activation_checkpointing", True)
    if micro > 1:
        vary("batch", "micro_batch", micro // 2)
    while (micro := 2 * micro) * job.layout.data <= config.batch.sequences:
        vary("batch", "micro_batch", micro)
    for name in ds_config_names():
        other = load_ds_config(name)
        if precision_of(other) == job.precision and other != ds_config:
            candidates.append((f"engine.ds_config={name}", config, other, processes))
    overlapping = {**ds_config, "zero_optimization": {**ds_config["zero_optimization"], "overlap_comm": True}}
    candidates.append(("zero_optimization.overlap_comm=true", config, overlapping, processes))
    vary("engine", "tensor_parallel", 2 * job.layout.tensor)
    if config.checkpoint.background:
        vary("checkpoint", "background", False)
    candidates.append((f"--processes {2 * processes}", config, ds_config, 2 * processes))
    for change, changed, ds, wanted in candidates:
        try:
            yield change, JobEstimate(changed, ds, wanted, job.given)
        except UserError:
            continue


def _would(fitting: list[str]) -> str:
    if fitting:
        return f"Would fit: {'; '.join(fitting)}."
    return "No single change fits: combine several, or take more GPUs."


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
