"""Set up a run: `decide` what each process can decide alone, then `build` the engine together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qatlaw.bit_widths import UNQUANTIZED_BITS
from qatscale.config.ds_config import ds_config_warnings, merge_ds_config, precision_of, run_ds_config
from qatscale.config.recipe import flatten
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters
from qatscale.data.manifest import Manifest
from qatscale.data.open import open_batches, open_validation, plan_sources
from qatscale.data.reader import EvaluationReader
from qatscale.engine.checkpoints.load import load_checkpoint
from qatscale.engine.compilation import Compilation, plan_compilation
from qatscale.engine.initialize import initialize_engine, place_parameters
from qatscale.engine.layout import Layout, job_size
from qatscale.engine.layout_plan import layout_notices, plan_layout
from qatscale.engine.qat_metrics import QatMetrics
from qatscale.engine.runtime import Runtime, uses_gpu
from qatscale.engine.spikes import SpikeGuard
from qatscale.engine.topology import Topology
from qatscale.model.initial_weights import InitialWeights
from qatscale.model.llama import Attention, Llama
from qatscale.quant.bit_widths import embedding_rule, get_quantizer
from qatscale.quant.fake_quantize import try_kernels
from qatscale.quant.plugin import QatPlugin
from qatscale.schedule.build import build_timeline
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.components import ResumePlan, RunSetup, TrainingComponents
from qatscale.train.metrics import Stopwatch
from qatscale.train.resume import as_begun, check_data, plan_resume


def decide(config: RunConfig, branch_from: str | None = None) -> RunSetup | None:
    """The set-up of the run that `config` describes; None if it is done.

    UserError for whatever is wrong with the input. Every process finds it alone, before any waits for another.
    """
    config = as_begun(config, RunFolder(config.folder))
    timeline = build_timeline(config)
    ds_config = run_ds_config(config)
    resume = plan_resume(config, timeline, branch_from)
    if resume is None:
        return None
    layout = plan_layout(config, ds_config, job_size())
    plan_compilation(config.engine, ds_config)
    ds_config = merge_ds_config(config, ds_config, layout.data)
    batches = open_batches(config, timeline)
    batches.manifest.document_end(config.data.document_mask)  # refuses before any process waits for another
    validation, missing = _held_out(config, batches.manifest)
    notices = (
        *timeline.warnings,
        *ds_config_warnings(config, uses_gpu()),
        *layout_notices(config, layout, torch.cuda.device_count() if uses_gpu() else 0),
        *resume.notices,
        *check_data(config, resume, batches.manifest),
        *filter(None, [missing]),
        *plan_sources(config, timeline, batches.held)[1],
    )
    return RunSetup(
        config, timeline, resume, layout, ds_config, precision_of(ds_config),
        batches, validation, notices,
    )  # fmt: skip


def _held_out(config: RunConfig, manifest: Manifest) -> tuple[EvaluationReader | None, str | None]:
    """The held-out batches, or None and a notice why."""
    counts = manifest.splits.get("validation")
    tokens = counts.tokens if counts else 0
    if tokens > config.data.sequence_length:
        return open_validation(config), None
    found = f"the data hold out {tokens:,} tokens, less than a sequence" if tokens else "the data hold nothing out"
    return None, f"{found}: this run gets no validation loss (a larger --validation-fraction gives one)"


def build(setup: RunSetup, runtime: Runtime) -> TrainingComponents:
    """The components of a run, at the step where it starts. Collective."""
    end = setup.batches.manifest.document_end(setup.config.data.document_mask)
    components = assemble(
        setup.config, setup.layout, setup.ds_config, runtime, setup.timeline.switch_step, end,
        draw=setup.resume.checkpoint is None,
    )  # fmt: skip
    _load(setup.resume, components)
    return components


def assemble(
    config: RunConfig,
    layout: Layout,
    ds_config: dict[str, Any],
    runtime: Runtime,
    switch_step: int | None,
    document_end: int | None = None,
    *,
    draw: bool = True,
) -> TrainingComponents:
    """Model, plugin and engine, with initial weights if `draw`, for a checkpoint's else. Collective.

    ds_config: merged. document_end: of `Llama`.
    """
    if runtime.device.type == "cuda":
        try_kernels(runtime.device)
    topology = Topology(config, layout, runtime)
    with torch.device("meta"):
        model = Llama(config.model, config.engine.activation_checkpointing, topology.tensor, topology.stage)
        plugin = QatPlugin(config.qat, switch_step)
        plugin.prepare(model)
    model.document_end = document_end
    weights = InitialWeights(config.model, config.seed, config.init)
    place_parameters(model, weights, ds_config, topology, runtime.device, draw=draw)
    engine, masters = initialize_engine(model, plugin, config, ds_config, topology)
    plan = plan_compilation(config.engine, ds_config)
    compilation = Compilation(model, plan)
    # what exchanges takes as long as on the slowest process; the inside of compiled blocks cannot be timed
    blocks_exchange = layout.tensor > 1 or ds_config["zero_optimization"]["stage"] == 3
    times_forward = not blocks_exchange and layout.pipeline == 1
    passages = config.batch.micro_batches(layout.data) * (1 if times_forward else config.model.layers / layout.pipeline)
    stopwatch = None
    if runtime.ranks > 1 and not (blocks_exchange and plan == "on"):
        stopwatch = Stopwatch(runtime.device, passages)
        if blocks_exchange:
            for module in model.modules():
                if isinstance(module, Attention):
                    module.timed = stopwatch
        elif not times_forward:
            model.run_block = stopwatch.around(model.run_block)
    qat_metrics = QatMetrics(masters, model, count_parameters(config.model))
    guard = SpikeGuard(masters, config.optimizer.spike_factor)
    return TrainingComponents(
        runtime, topology, engine, masters, plugin, compilation, qat_metrics, guard, stopwatch, times_forward
    )


def roll_back(setup: RunSetup, components: TrainingComponents, step: int) -> RunSetup:
    """Take the components back to the run's newest checkpoint, to pass over the batch of `step` from now on.

    The set-up from there. FloatingPointError where there is no checkpoint yet. Collective.
    """
    resume = plan_resume(setup.config, setup.timeline)
    if resume is None or resume.checkpoint is None:
        problem = f"step {step + 1} is a spike before the first checkpoint, so there is none to roll back to"
        raise FloatingPointError(f"{problem}. Lower optimizer.learning_rate or checkpoint.interval.")
    state = components.guard.state
    _load(resume, components)
    components.guard.roll_back(state, step)
    return replace(setup, resume=resume)


def _load(resume: ResumePlan, components: TrainingComponents) -> None:
    """Put the checkpoint to start from, if any, into a fresh engine and plugin.

    Scales that are not in use yet need not fit: a branch may quantize at other bit widths, more layers or fewer than
    its parent.
    """
    if resume.checkpoint is None:
        return
    assert resume.manifest is not None
    inert = resume.manifest.switched_at is None
    load_checkpoint(resume.checkpoint, components.masters, components.runtime, keep_scales=inert)
    components.plugin.load_state(resume.manifest.plugin)
    components.guard.state = resume.manifest.spikes


def resolved_settings(setup: RunSetup) -> dict[str, Any]:
    """The values of the recipe's keys that say `auto`, and QAT's share as it is. None: without effect in this run."""
    config, timeline, qat = setup.config, setup.timeline, setup.config.qat
    quantized = qat.scheme != "fp"
    rule = embedding_rule(qat.embedding_bits, config.model.tied_embedding)
    values = {
        "qat.embedding_bits": (rule.at(qat.bits) if rule else UNQUANTIZED_BITS) if quantized else None,
        "qat.lr_ratio": timeline.qat_lr_ratio if quantized else None,
        "qat.scale_lr_ratio": get_quantizer(qat.bits).scale_lr_ratio if quantized else None,
        "engine.compile": plan_compilation(config.engine, setup.ds_config),
    }
    given = flatten(config)
    resolved = {key: value for key, value in values.items() if given[key] == "auto"}
    return {"qat.fraction": timeline.qat_fraction, **resolved}
