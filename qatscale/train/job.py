"""What a run consists of: what is decided before its processes meet, and what they build together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qatscale.config import ds_config_warnings, merge_ds_config, run_ds_config
from qatscale.config.schema import RunConfig
from qatscale.data.reader import BatchReader, EvaluationReader
from qatscale.engine.checkpoints.save_load import load_checkpoint
from qatscale.engine.compilation import Compilation, Compiled, plan_compilation
from qatscale.engine.fragments import ZeroMasters
from qatscale.engine.initialize import initialize_engine
from qatscale.engine.layout import Layout, layout_notices, plan_layout
from qatscale.engine.qat_metrics import QatMetrics
from qatscale.engine.runtime import Runtime, job_size
from qatscale.engine.topology import Topology, join_topology
from qatscale.model.llama import Llama, initialise
from qatscale.model.sizes import count_parameters
from qatscale.quant.plugin import QatPlugin
from qatscale.timeline import Timeline, build_timeline
from qatscale.train.evaluate import open_stream, open_validation
from qatscale.train.start import Start, check_data, plan_start


@dataclass(frozen=True)
class Plan:
    """Everything about a run that one process can know alone."""

    config: RunConfig
    timeline: Timeline
    start: Start
    layout: Layout
    ds_config: dict[str, Any]
    """Merged: what DeepSpeed gets."""
    batches: BatchReader
    validation: EvaluationReader
    notices: tuple[str, ...]


def plan_run(config: RunConfig, branch_from: str | None = None) -> Plan | None:
    """The plan of the run that `config` describes; None if it is done. UserError for whatever is wrong with the input:
    every process finds it alone, before any waits for another."""
    timeline = build_timeline(config)
    ds_config = run_ds_config(config)
    start = plan_start(config, timeline, branch_from)
    if start is None:
        return None
    layout = plan_layout(config, ds_config, job_size())
    plan_compilation(config.engine, ds_config)
    ds_config = merge_ds_config(config, ds_config, layout.data)
    batches, validation = open_batches(config), open_validation(config)
    repetition = batches.repetition(timeline.steps)
    notices = (
        *timeline.warnings,
        *ds_config_warnings(config),
        *layout_notices(config, layout),
        *start.notices,
        *check_data(config, start, batches.stream.manifest.fingerprint),
        *filter(None, [repetition]),
    )
    return Plan(config, timeline, start, layout, ds_config, batches, validation, notices)


def open_batches(config: RunConfig) -> BatchReader:
    """The training batches of a run."""
    stream, length = open_stream(config, "train"), config.data.sequence_length
    return BatchReader(stream, length, config.batch.sequences, config.data.seed)


@dataclass(frozen=True)
class Job:
    """What this process has of a run: its place, its part of the model, the engine, the way to the masters."""

    runtime: Runtime
    topology: Topology
    engine: Any
    masters: ZeroMasters
    plugin: QatPlugin
    compilation: Compilation
    qat_metrics: QatMetrics


def assemble(plan: Plan, runtime: Runtime) -> Job:
    """Model, plugin and engine, at the point where the run starts. Collective."""
    config = plan.config
    topology = join_topology(config, plan.layout, runtime)
    model = Llama(config.model, config.engine.activation_checkpointing, topology.tensor, topology.stage)
    initialise(model, config.seed)
    plugin = QatPlugin(config.qat, plan.timeline.switch_step)
    plugin.prepare(model)
    engine, masters = initialize_engine(model.to(runtime.device), plugin, config, plan.ds_config, topology)
    compiles = plan_compilation(config.engine, plan.ds_config)
    compilation = Compiled(model) if compiles else Compilation()
    qat_metrics = QatMetrics(masters, model, count_parameters(config.model).total)
    job = Job(runtime, topology, engine, masters, plugin, compilation, qat_metrics)
    _load_start(plan.start, job)
    return job


def _load_start(start: Start, job: Job) -> None:
    """Put the starting checkpoint, if there is one, into a fresh engine and plugin.

    Scales not yet in use need not fit: a branch may quantize at other widths, more layers or fewer than its parent.
    """
    if start.checkpoint is None:
        return
    assert start.manifest is not None
    inert = start.manifest.plugin["switched_at"] is None
    load_checkpoint(start.checkpoint, job.masters, job.runtime, keep=_is_scale if inert else None)
    job.plugin.load_state(start.manifest.plugin)


def _is_scale(name: str) -> bool:
    return name.endswith(".weight_scale")
