"""What a run consists of: what each process decides alone, and what the processes build together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlaw.effective_bits import StoredWeights
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import Precision, stored_weights
from qatscale.data.reader import BatchReader, EvaluationReader
from qatscale.engine.checkpoints.manifest import Manifest
from qatscale.engine.compilation import Compilation
from qatscale.engine.layout import Layout
from qatscale.engine.qat_metrics import QatMetrics
from qatscale.engine.runtime import Runtime
from qatscale.engine.spikes import SpikeGuard, SpikeState
from qatscale.engine.topology import Topology
from qatscale.engine.zero_masters import ZeroMasters
from qatscale.quant.plugin import QatPlugin
from qatscale.schedule.timeline import Timeline
from qatscale.train.metrics import Stopwatch


@dataclass(frozen=True)
class ResumePlan:
    """Where training begins: at step 0, or at a checkpoint of this run or of the run it branches from."""

    checkpoint: Path | None
    manifest: Manifest | None
    """The checkpoint's."""
    resumes: bool
    """The run's folder exists and is continued; otherwise a new folder is made."""
    parent: dict[str, Any] | None
    """{"name", "folder", "step"} of the run that a branch comes from."""
    notices: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step if self.manifest else 0


@dataclass(frozen=True)
class RunSetup:
    """Everything about a run that one process can decide without the others."""

    config: RunConfig
    timeline: Timeline
    resume: ResumePlan
    layout: Layout
    ds_config: dict[str, Any]
    """Merged with the recipe: what DeepSpeed gets."""
    precision: Precision
    """The type of forward and backward; the masters are in fp32."""
    batches: BatchReader
    validation: EvaluationReader | None
    """None where nothing, or less than a sequence, is held out."""
    notices: tuple[str, ...]

    @property
    def weights(self) -> StoredWeights:
        """As the recipe has them quantized, in the type of forward."""
        return stored_weights(self.config.model, self.config.qat, self.precision)

    def tokens_by_source(self, step: int, spikes: SpikeState) -> dict[str, int]:
        """`tokens/SOURCE`: the tokens that this run, after its branch point, has read in its first `step` steps.

        Empty without a mixture.
        """
        if self.config.data.mix is None:
            return {}
        began = self.resume.parent["step"] if self.resume.parent else 0
        tokens = self.batches.tokens(spikes.batch_of(began), spikes.batch_of(step), spikes.left_out)
        return {f"tokens/{name}": count for name, count in tokens.items()}


@dataclass(frozen=True)
class TrainingComponents:
    """What this process has of a run: its place, its part of the model, the engine, access to the fp32 masters."""

    runtime: Runtime
    topology: Topology
    engine: Any
    masters: ZeroMasters
    plugin: QatPlugin
    compilation: Compilation
    qat_metrics: QatMetrics
    guard: SpikeGuard
    stopwatch: Stopwatch | None
    """Times what this process computes by itself; None where that cannot be told."""
    times_forward: bool
    """Whether the stopwatch is put around forward passes; blocks or attention have it otherwise."""
