"""What `--dry-run` says of a run's layout: memory of a process, traffic, bubble, speed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qatscale.cli.terminal import console, plain_table
from qatscale.config.schema import RunConfig
from qatscale.engine.dry_run.ledger import ON_DEVICE, Kind
from qatscale.engine.dry_run.scale_plan import ScalePlan, plan_scale, refuse_what_cannot_fit
from qatscale.errors import UserError

_SHOWN: dict[Kind, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "scales": "α, with gradients and state",
    "quantized": "quantized weights",
    "activations": "activations",
    "buffers": "communication buffers",
}
_STAGES = 8
"""Columns that a terminal holds; of more stages the first, the last and the fullest are shown."""


def print_dry_run(
    config: RunConfig, figure: Path | None, processes: int | None, gpu: str | None, mfu: float | None, as_json: bool
) -> None:
    """The timeline, then the layout. UserError where it cannot work or does not fit, after both are shown."""
    from qatscale.cli.show import print_timeline
    from qatscale.config import run_ds_config

    if as_json and figure is not None:
        raise UserError("--figure", str(figure), "does not go with --json.", "Ask for one of them.")
    if not as_json:
        print_timeline(config, figure)
    ds_config = run_ds_config(config)
    plan = plan_scale(config, ds_config, processes or job_size(config), gpu, mfu)
    if as_json:
        print(json.dumps({"timeline": _timeline(config), "scale": as_dict(plan)}, indent=2))
    else:
        print_scale(plan, config)
    refuse_what_cannot_fit(config, ds_config, plan)


def job_size(config: RunConfig) -> int:
    """WORLD_SIZE; without it, the smallest job of this layout."""
    smallest = config.engine.tensor_parallel * config.engine.pipeline_stages
    return int(os.environ.get("WORLD_SIZE", smallest))


def print_scale(plan: ScalePlan, config: RunConfig) -> None:
    out, stages = console(), _chosen(plan)
    headers = [f"stage {stage.stage}" if plan.layout.pipeline > 1 else "a process" for stage in stages]
    title = (
        f"{plan.layout.processes} processes: {plan.layout}, ZeRO-{plan.zero_stage}, {plan.precision}, "
        f"{plan.micro_batches} micro-batches of {config.batch.micro_batch} a step"
    )
    table = plain_table("fullest moment of a step, GB", *headers, right=tuple(headers))
    out.print(title, soft_wrap=True)
    for kind in ON_DEVICE:
        if any(stage.kinds[kind] for stage in stages):
            table.add_row(_SHOWN[kind], *(_gigabytes(stage.kinds[kind]) for stage in stages))
    table.add_row("[bold]all[/bold]", *(f"[bold]{_gigabytes(stage.step)}[/bold]" for stage in stages))
    table.add_row("moment, phase", *(f"{stage.moment}, {stage.phase}" for stage in stages))
    if any(stage.start > stage.step for stage in stages):
        table.add_row("at the start: fp32, not yet divided", *(_gigabytes(stage.start) for stage in stages))
    if any(stage.kinds["host"] for stage in stages):
        table.add_row("on the host", *(_gigabytes(stage.kinds["host"]) for stage in stages))
    out.print(table)
    _print_traffic(plan)
    if plan.gpu_memory is not None:
        verdict = "fits into" if plan.fits else "does not fit into"
        out.print(
            f"{_gigabytes(plan.fullest.total)} GB {verdict} the {_gigabytes(plan.gpu_memory)} GB of one {plan.gpu}"
        )
    if plan.tokens_per_second and plan.step_seconds and plan.mfu:
        days = config.tokens / plan.tokens_per_second / 86_400
        out.print(
            f"at {plan.mfu:.0%} of the peak while a stage works: {plan.tokens_per_second:,.0f} tokens/s, "
            f"{plan.step_seconds:,.2f} s a step, {days:,.2g} days in all",
            soft_wrap=True,
        )
    for notice in plan.notices:
        out.print(notice, soft_wrap=True)


def _print_traffic(plan: ScalePlan) -> None:
    if not plan.traffic:
        return
    per_second = ("GB/s",) if plan.step_seconds else ()
    table = plain_table("sent by a process", "GB a step", *per_second, right=("GB a step", *per_second))
    for kind, size in plan.traffic.items():
        rate = (f"{size / 1e9 / plan.step_seconds:,.3g}",) if plan.step_seconds else ()
        table.add_row(kind, f"{size / 1e9:,.3g}", *rate)
    console().print(table)


def _chosen(plan: ScalePlan) -> list[Any]:
    if len(plan.stages) <= _STAGES:
        return list(plan.stages)
    shown = {0, len(plan.stages) - 1, plan.fullest.stage}
    return [plan.stages[index] for index in sorted(shown)]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3g}"


def as_dict(plan: ScalePlan) -> dict[str, Any]:
    """JSON-able; sizes in bytes."""
    stages = [asdict(stage) | {"total": stage.total} for stage in plan.stages]
    return {
        **asdict(plan), "processes": plan.layout.processes, "stages": stages, "fullest_stage": plan.fullest.stage,
        "fits": plan.fits,
    }  # fmt: skip


def _timeline(config: RunConfig) -> dict[str, Any]:
    from qatscale.config import ds_config_warnings
    from qatscale.timeline import build_timeline

    timeline = build_timeline(config)
    return {
        "name": config.name,
        "tokens": timeline.tokens,
        "steps": timeline.steps,
        "tokens_per_step": timeline.tokens_per_step,
        "switch_step": timeline.switch_step,
        "qat_fraction": timeline.qat_fraction,
        "qat_lr_ratio": timeline.qat_lr_ratio,
        "warnings": [*timeline.warnings, *ds_config_warnings(config)],
    }
