"""`qatscale train … --dry-run`: a run's timeline, memory, network traffic and speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qatlaw.bit_widths import bits_label
from qatlaw.text import plural
from qatlaw.text_table import TextTable
from qatscale.cli.terminal import check_figure, console, say
from qatscale.config.amounts import format_amount
from qatscale.config.ds_config import ds_config_warnings, precision_of, run_ds_config
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import stored_weights
from qatscale.data.open import data_here, plan_sources
from qatscale.engine.estimate.fits import Given, JobEstimate, StageMemory, network_advice, refuse_what_cannot_fit
from qatscale.engine.estimate.memory import ON_DEVICE, Kind
from qatscale.engine.layout import job_size
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from qatscale.schedule.timeline import Timeline
from qatscale.train.console import format_duration

_SHOWN: dict[Kind, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "scales": "α, with gradients and state",
    "quantized": "quantized weights",
    "activations": "activations",
    "buffers": "communication buffers",
}
COLUMNS = (
    "phase", "from step", "to step", "steps", "tokens", "up to token", "learning rate", "betas", "decay", "weights",
)  # fmt: skip
_LABELS, _COLUMN = 36, 13
"""Characters that the row labels and a stage take."""


def print_dry_run(
    config: RunConfig,
    branch_from: str | None = None,
    figure: Path | None = None,
    processes: int | None = None,
    given: Given | None = None,
    as_json: bool = False,
    *,
    resumes: bool = False,
) -> None:
    """Show the timeline and the layout. UserError where the layout cannot work and, after both are shown, where memory
    does not suffice.

    resumes: `config` is to continue the run in its folder. Otherwise another run there is only a warning.
    """
    if as_json and figure is not None:
        raise UserError("--figure", str(figure), "does not go with --json.", "Ask for one of them.")
    check_figure(figure)
    timeline, branch = build_timeline(config), None
    notices: tuple[str, ...] = ()
    held, data = data_here(config)
    exists = (config.folder / "run.json").exists()
    if branch_from is not None or exists:
        from qatscale.engine.checkpoints.files import verify_files
        from qatscale.tracking.run_folder import RunFolder
        from qatscale.train.resume import as_begun, check_data, plan_resume

        resumed = as_begun(config, RunFolder(config.folder))
        try:
            start = plan_resume(resumed, build_timeline(resumed), branch_from)
            notices = (*start.notices, *(check_data(config, start, data) if data else ())) if start else ()
            if start and start.manifest and start.checkpoint:
                verify_files(start.checkpoint, start.manifest, read=False)
            branch = {"checkpoint": start and start.checkpoint and str(start.checkpoint), "step": start and start.step}
        except UserError as error:
            if branch_from is not None or resumes:
                raise
            notices = (f"training will need another name=NAME: {error}",)
    ds_config = run_ds_config(config)
    smallest = config.engine.tensor_parallel * config.engine.pipeline_stages
    job = JobEstimate(config, ds_config, processes or job_size(smallest), given)
    advice = network_advice(job)
    sources, repetitions = plan_sources(config, timeline, held)
    warnings = [*ds_config_warnings(config, on_gpu=job.gpu_memory is not None), *repetitions, *notices]
    if as_json:
        scale = as_dict(job) | {"network_advice": advice}
        shown = {"name": config.name, **timeline.to_dict()}
        shown["warnings"] = [*shown["warnings"], *warnings]
        print(json.dumps({"timeline": shown, "sources": sources, "branch": branch, "scale": scale}, indent=2))
    else:
        print_timeline(config, timeline, figure, warnings)
        print_sources(config, sources)
        if branch and branch["step"] is None:
            say(f"{config.folder} is done: nothing is left to train")
        elif branch:
            say(f"begins at step {branch['step']:,} of {branch['checkpoint'] or 'the run, which has no checkpoint'}")
        print_scale(job, advice)
    refuse_what_cannot_fit(job)


def print_timeline(config: RunConfig, timeline: Timeline, figure: Path | None, warnings: Sequence[str]) -> None:
    steps = f"{plural(timeline.steps, 'step')} of {timeline.tokens_per_step:,}"
    out, title = console(), f"{config.name}: {config.qat.scheme}, {format_amount(timeline.tokens)} tokens in {steps}"
    drop = ("decay", "steps", "tokens", "betas", "from step")
    out.print(TextTable(COLUMNS, words=["phase"], title=title, drop=drop, rows=describe(timeline, config)))
    out.print()
    if timeline.switch_step is not None:
        tokens = format_amount(timeline.switch_step * timeline.tokens_per_step)
        share = f"{timeline.qat_fraction:.2%} of the tokens at {bits_label(config.qat.bits)}"
        say(f"switch to QAT before step {timeline.switch_step:,} ({tokens} tokens): {share}")
        weights = stored_weights(config.model, config.qat, precision_of(run_ds_config(config)))
        say(f"parameters: {weights.text(config.qat.bits)}")
        rate = f"{timeline.qat_lr_ratio:.4g} x optimizer.learning_rate={config.optimizer.learning_rate:g}"
        say(f"peak rate of the QAT phase: {rate}")
    for warning in (*timeline.warnings, *warnings):
        say(f"warning: {warning}", style="yellow")
    if figure is not None:
        from qatscale.schedule.figure import draw

        say(f"figure: {draw(timeline, config, figure)}")


def describe(timeline: Timeline, config: RunConfig) -> list[tuple[str, ...]]:
    """One row per segment, as text, in the order of `COLUMNS`. The rate is that of its first and of its last step."""
    rows: list[tuple[str, ...]] = []
    for segment in timeline.segments:
        first, last = (f"{segment.learning_rate(step):.3g}" for step in (segment.start, segment.end - 1))
        rows.append(
            (
                segment.phase,
                f"{segment.start:,}",
                f"{segment.end:,}",
                f"{segment.steps:,}",
                format_amount(segment.steps * timeline.tokens_per_step),
                format_amount(segment.end * timeline.tokens_per_step),
                first if first == last else f"{first} → {last}",
                f"{segment.betas[0]:g}, {segment.betas[1]:g}",
                f"{segment.weight_decay:g}",
                bits_label(config.qat.bits) if segment.quantized else "full",
            )
        )
    return rows


def print_sources(config: RunConfig, sources: list[dict[str, Any]]) -> None:
    if config.data.mix is None:
        return
    columns = ("source", "data.mix", "data.cooldown_mix", "tokens", "epochs")
    table = TextTable(columns, words=["source"], drop=("data.mix", "data.cooldown_mix"))
    for row in sources:
        amounts = (format_amount(row[key]) for key in ("mix", "cooldown_mix", "tokens"))
        table.add_row(row["source"], *amounts, "?" if row["epochs"] is None else f"{row['epochs']:.2f}")
    say("")
    console().print(table)
    if config.data.cooldown_mix and not any(row["cooldown_mix"] for row in sources):
        say("warning: data.cooldown_mix has no effect: the run has no cooldown and no switch to QAT", style="yellow")


def print_scale(job: JobEstimate, advice: str | None) -> None:
    out, config = console(), job.config
    stages = _chosen(job, (out.width - _LABELS) // _COLUMN)
    headers = [f"stage {stage.stage}" if job.layout.pipeline > 1 else "a process" for stage in stages]
    say("")
    say(
        f"{plural(job.layout.processes, 'process')}: {job.layout}, ZeRO-{job.zero_stage}, {job.precision}, "
        f"{plural(job.micro_batches, 'micro-batch')} of {config.batch.micro_batch} a step"
    )
    table = TextTable((name := "fullest moment of a step, GB", *headers), words=[name])
    for kind in ON_DEVICE:
        if any(stage.kinds[kind] for stage in stages):
            table.add_row(_SHOWN[kind], *(_gigabytes(stage.kinds[kind]) for stage in stages))
    table.add_row("all", *(_gigabytes(stage.step) for stage in stages))
    table.add_row("moment, phase", *(f"{stage.moment}, {stage.phase}" for stage in stages))
    if any(stage.start > stage.step for stage in stages):
        table.add_row("at the start", *(_gigabytes(stage.start) for stage in stages))
    out.print(table)
    out.print()
    if job.traffic:
        table = TextTable(("sent by a process", "GB a step"), words=["sent by a process"])
        for name, size in job.traffic.items():
            table.add_row(name, _gigabytes(size))
        out.print(table)
        out.print()
    if job.gpu_memory is not None:
        verdict = "fits into" if job.fits else "does not fit into"
        memory = _gigabytes(job.gpu_memory)
        say(f"{_gigabytes(job.fullest.total)} GB {verdict} the {memory} GB of one {job.given.gpu or 'GPU'}")
    say(_host(job))
    if job.traffic:
        network = job.network
        where = "between nodes" if network.nodes > 1 else "inside the node"
        hidden = f", {network.overlapped:,.3g} s of it while the GPU computes" if network.overlapped else ""
        speed = f"network, {network.gigabytes_per_second:g} GB/s a GPU {where}"
        say(f"{speed}: {network.seconds:,.3g} s a step{hidden}")
    if job.step_seconds and job.compute_seconds and job.given.mfu:
        rate = config.tokens_per_step / job.step_seconds
        say(
            f"at {job.given.mfu:.0%} of the peak while a stage works: {rate:,.0f} tokens/s, "
            f"{job.step_seconds:,.3g} s a step, {format_duration(config.tokens / rate)} in all"
        )
    for notice in filter(None, (advice, *job.notices)):
        say(notice)


def _host(job: JobEstimate) -> str:
    host = job.host
    parts = {"libraries": host.libraries, "checkpoint copies": host.checkpoint, "offloaded": host.offloaded}
    shown = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)
    node = f" of a node of {host.processes}" if job.layout.processes > 1 else ""
    return f"host memory{node}: {_gigabytes(host.total)} GB ({shown})"


def _chosen(job: JobEstimate, columns: int) -> list[StageMemory]:
    """All stages, or the first, the fullest and the last of more than a terminal holds."""
    if len(job.stages) <= columns:
        return list(job.stages)
    shown = {0, len(job.stages) - 1, job.fullest.stage}
    return [job.stages[index] for index in sorted(shown)]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3g}"


def as_dict(job: JobEstimate) -> dict[str, Any]:
    """JSON-able; sizes in bytes."""
    return {
        "layout": asdict(job.layout), "zero_stage": job.zero_stage, "precision": job.precision,
        "micro_batches": job.micro_batches, "stages": [asdict(one) | {"total": one.total} for one in job.stages],
        "host": vars(job.host), "traffic": job.traffic, "network": vars(job.network), "bubble": job.bubble,
        "notices": job.notices, "given": asdict(job.given), "gpu_memory": job.gpu_memory,
        "compute_seconds": job.compute_seconds, "processes": job.layout.processes, "fits": job.fits,
        "fits_host": job.fits_host, "fullest_stage": job.fullest.stage, "gpu": job.given.gpu, "mfu": job.given.mfu,
        "step_seconds": job.step_seconds,
        "tokens_per_second": job.config.tokens_per_step / job.step_seconds if job.step_seconds else None,
    }  # fmt: skip
