"""`qatscale study`: plan a grid of runs as a tree, train it with any number of workers, watch it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatlaw.planner_law import law_names
from qatscale.cli import study_run
from qatscale.cli.fit import Experiment, Runs, Table, Uri
from qatscale.errors import UserError

if TYPE_CHECKING:
    from qatlaw.information import Certainty
    from qatlaw.planner_law import PlannerLaw
    from qatlaw.runs import RunRecord
    from qatlaw.study import Tree
    from qatscale.study import Grid, Study, StudyRun
    from qatscale.study.forecast import Forecast

    Certainties = dict[str, tuple[Certainty | None, Certainty]]
    """By scheme, before and after the study."""

study = typer.Typer(help="Studies: grids of runs that share their trunks.", no_args_is_help=True)
study.command()(study_run.run)
study.command()(study_run.work)
study.command()(study_run.status)


@study.command()
def plan(
    file: Annotated[Path, typer.Argument(help="A study: analysis/studies/small.yaml shows the format.")],
    law: Annotated[
        str | None,
        typer.Option(
            metavar="LAW",
            help="Law under which the runs' information is predicted: path of a fit.json, or one of "
            f"{', '.join(law_names())}.",
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of a run's log loss: 0.002 is 0.2 %.")] = 0.002,
    experiment: Experiment = None,
    table: Table = None,
    runs: Runs = None,
    uri: Uri = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers, for the time and the disk it takes.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="Device of each worker, for the hours it takes: H200.")] = None,
    mfu: Annotated[float | None, typer.Option(help="With --gpu: share of its peak that runs reach: 0.4.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """The cheapest tree of runs that covers a study: which run branches where, its tokens, FLOPs, time and disk.

    With --law also the certainty of the law's coefficients and of the optimal fraction that the runs allow, beside that
    of the runs there are already (--experiment, --table or --runs).
    """
    from qatlaw.study import cheapest_tree
    from qatscale.model.sizes import count_parameters
    from qatscale.study import grid, read_study
    from qatscale.study.forecast import forecast

    if not noise > 0:
        raise UserError("--noise", noise, "a standard deviation above 0.")
    found = read_study(file)
    cells = grid(found)
    tree = cheapest_tree([run.route for run in cells.runs])
    known = any(value is not None for value in (experiment, table, runs))
    if law is None and known:
        raise UserError("--law", None, "is missing: runs there are already count only for the information.", "Add it.")
    parameters = {run.route.name: count_parameters(run.config.model).total for run in cells.runs}
    cost = forecast(tree.jobs, parameters, workers)
    speed = _flops_per_second(gpu, mfu)
    assumed: PlannerLaw | None = None
    certainties: Certainties = {}
    if law is not None:
        assumed, certainties = _certainties(law, cells, noise, (experiment, table, runs, uri) if known else None)
    if as_json:
        plain = _plain(found, cells, tree, assumed, noise, certainties) | {"forecast": asdict(cost)}
        print(json.dumps(plain, indent=2))
        return
    _print_tree(found, cells, tree, cost, speed)
    if assumed is not None:
        _print_certainty(assumed, cells, noise, certainties)


def _certainties(name: str, cells: Grid, noise: float, known: tuple[Any, ...] | None) -> tuple[PlannerLaw, Certainties]:
    """The law, and by scheme the certainty by the runs that exist, and by them and the study's."""
    from qatlaw.information import certainties
    from qatlaw.planner_law import load_law
    from qatlaw.runs import planned_points
    from qatscale.cli.fit import collect_runs

    assumed = load_law(name)
    width = assumed.range["bits"][0] if assumed.law.form.one_width else None
    existing = collect_runs(*known)[0].table.frame if known is not None else None
    planned = planned_points([_as_record(run) for run in cells.runs])
    return assumed, certainties(assumed.law, planned, noise, existing, width)


def _as_record(run: StudyRun) -> RunRecord:
    """What tracking would keep of the run, but its loss."""
    from qatlaw.runs import RunRecord
    from qatscale.model.sizes import count_parameters
    from qatscale.tracking.mlflow_names import flatten

    tokens_qat = run.timeline.qat_steps * run.timeline.tokens_per_step
    final = {
        "n_params": float(count_parameters(run.config.model).total),
        "bits": float(run.config.qat.bits),
        "tokens_fp": float(run.timeline.tokens - tokens_qat),
        "tokens_qat": float(tokens_qat),
        "scheme": run.config.qat.scheme,
    }
    return RunRecord(run.config.name, run.config.name, "PLANNED", final, flatten(run.config.model_dump(mode="json")))


def _fraction_errors(assumed: PlannerLaw, cells: Grid, certainty: Certainty) -> dict[float, list[float | None]]:
    """By width that the law describes, the standard errors of f* at the study's sizes and token counts."""
    from qatscale.model.sizes import count_parameters

    one = assumed.range["bits"][0] if assumed.law.form.one_width else None

    points = {
        (float(count_parameters(run.config.model).total), float(run.timeline.tokens), float(run.config.qat.bits))
        for run in cells.runs
        if run.config.qat.scheme in ("sequential", "fused") and one in (None, run.config.qat.bits)
    }
    found: dict[float, list[float | None]] = {}
    for N, D, B in sorted(points):
        found.setdefault(B, []).append(certainty.determined_fraction(N, D, B))
    return found


# --- printing ---


def _print_tree(found: Study, cells: Grid, tree: Tree, cost: Forecast, speed: float | None) -> None:
    from rich.tree import Tree as Branches

    from qatscale.cli.terminal import console, plain_table
    from qatscale.config.amounts import format_amount
    from qatscale.train.console import format_duration

    out = console()
    root = Branches(f"Study {found.name}: run @ step it branches at, tokens to train")
    branches: dict[str | None, Branches] = {None: root}
    for job in tree.jobs:
        at = f" @{job.start:,}" if job.parent else ""
        own = f"{job.route.name}{at}  {format_amount(job.new_tokens)}"
        branches[job.route.name] = branches[job.parent].add(own)
    out.print(root, soft_wrap=True)
    out.print()
    table = plain_table("cost", "as a tree", "each run alone", "share", right=("as a tree", "each run alone", "share"))
    table.add_row("runs", f"{len(tree.jobs):,}", f"{len(tree.jobs):,}", "")
    for name, whole, alone, shown in (
        ("tokens", tree.tokens, tree.tokens_alone, format_amount),
        ("FLOPs", tree.flops, tree.flops_alone, lambda value: f"{value:.3g}"),
    ):
        table.add_row(name, shown(whole), shown(alone), f"{whole / alone:.1%}")
    out.print(table)
    amount = f"{cost.makespan / cost.flops:.1%} of the work" if cost.workers > 1 else "all of the work"
    taken = f", {format_duration(cost.makespan / speed)}" if speed else ""
    longest = f", {format_duration(cost.longest / speed)}" if speed else ""
    out.print(
        f"time: {cost.workers} {'workers' if cost.workers > 1 else 'worker'}: {amount}{taken}; the longest chain of "
        f"runs, which no number of workers shortens: {cost.longest / cost.flops:.1%}{longest}",
        soft_wrap=True,
    )
    out.print(
        f"disk: checkpoints take {_bytes(cost.disk)} at the fullest moment and {_bytes(cost.disk_at_end)} at the end, "
        "when one a run is left",
        soft_wrap=True,
    )
    for line in _left_out_lines(cells):
        out.print(line, soft_wrap=True)
    for warning in cells.warnings:
        out.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _bytes(count: int) -> str:
    from qatscale.config.amounts import format_amount

    return f"{format_amount(count).replace('K', ' k').replace('M', ' M').replace('B', ' G').replace('T', ' T')}B"


def _flops_per_second(gpu: str | None, mfu: float | None) -> float | None:
    """What a worker computes; None where nobody says."""
    from qatscale.model.sizes import device_names, peak_flops

    if (gpu is None) != (mfu is None):
        raise UserError("--gpu" if gpu is None else "--mfu", None, "is missing.", "Give both, or neither.")
    if gpu is None or mfu is None:
        return None
    if not 0 < mfu <= 1:
        raise UserError("--mfu", mfu, "a share of the device's peak, above 0 and at most 1, e.g. 0.4.")
    peak = peak_flops(gpu)
    if peak is None:
        raise UserError("--gpu", gpu, "its peak is not known here.", f"Known: {', '.join(device_names())}.")
    return peak * mfu


def _left_out_lines(cells: Grid) -> list[str]:
    if not cells.left_out:
        return []
    names = [name for name, _ in cells.left_out]
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return [f"left out: {len(names)} runs whose schedule does not fit ({shown}). The first: {cells.left_out[0][1]}"]


def _print_certainty(assumed: PlannerLaw, cells: Grid, noise: float, found: Certainties) -> None:
    from statistics import median

    from qatlaw.figures.style import bits_label
    from qatlaw.information import error_text
    from qatscale.cli.terminal import console, plain_table

    out = console()
    for scheme, (before, after) in found.items():
        columns = (("before", before), ("after", after)) if before is not None else (("standard error", after),)
        headers = tuple(name for name, _ in columns)
        title = f"What the {scheme} runs tell at best, at {noise:.2%} noise, if this law holds: {assumed.source}"
        table = plain_table("of", *headers, right=headers, title=title)
        certainties = [one for _, one in columns if one is not None]
        for parameter in assumed.law.form.parameters:
            errors = [one.determined[parameter.name] for one in certainties]
            table.add_row(parameter.name, *(error_text(parameter, error) for error in errors))
        for bits in _fraction_errors(assumed, cells, after):
            by_cell = [_fraction_errors(assumed, cells, one)[bits] for one in certainties]
            middle = [median(math.inf if error is None else error for error in errors) for errors in by_cell]
            told = (error_text(None, None if math.isinf(error) else error) for error in middle)
            table.add_row(f"optimal fraction at {bits_label(bits)} (median)", *told)
        out.print(table)
    out.print(
        "Standard errors, of coefficients in per cent; from the Fisher information of the runs, (1/s²) Σ g gᵀ with "
        "g = d ln L / dθ, inverted (Cramér–Rao), and the delta method for the fraction. Each scheme counts with the "
        "full-precision runs, as it is fitted; an error above 30 % leaves a coefficient not determined. QAT from "
        "scratch and PTQ tell nothing under a law that describes neither. Noise that branches share with their trunk "
        "is not counted.",
        soft_wrap=True,
    )


def _plain(
    found: Study,
    cells: Grid,
    tree: Tree,
    assumed: PlannerLaw | None,
    noise: float,
    certainties: Certainties,
) -> dict[str, Any]:
    """The plan for programs. A run is `qatscale train RECIPE OVERRIDES`, a branch adds `--branch-from`."""
    runs: dict[str, StudyRun] = {run.route.name: run for run in cells.runs}
    jobs = []
    for job in tree.jobs:
        run = runs[job.route.name]
        parent = runs[job.parent].config.folder if job.parent else None
        kept = [step * job.route.tokens_per_step for step in tree.kept[job.route.name]]
        overrides = [*run.overrides, f"checkpoint.keep_at=[{', '.join(map(str, kept))}]"] if kept else [*run.overrides]
        jobs.append(
            {
                "name": job.route.name,
                "recipe": run.recipe,
                "overrides": overrides,
                "branch_from": f"{parent}@{job.start}" if parent else None,
                "start": job.start,
                "steps": job.route.steps,
                "new_tokens": job.new_tokens,
            }
        )
    plan: dict[str, Any] = {
        "study": found.name,
        "runs": jobs,
        "left_out": [{"name": name, "reason": reason} for name, reason in cells.left_out],
        "warnings": list(cells.warnings),
        "tokens": tree.tokens,
        "tokens_alone": tree.tokens_alone,
        "flops": tree.flops,
        "flops_alone": tree.flops_alone,
    }
    if assumed is not None:
        schemes = {
            scheme: {
                "before": _plain_certainty(assumed, cells, before) if before else None,
                "after": _plain_certainty(assumed, cells, after),
            }
            for scheme, (before, after) in certainties.items()
        }
        plan["information"] = {
            "law": assumed.source, "synthetic": assumed.synthetic, "noise": noise, "schemes": schemes,
        }  # fmt: skip
    return plan


def _plain_certainty(assumed: PlannerLaw, cells: Grid, certainty: Certainty) -> dict[str, Any]:
    """Standard errors; null for what is not determined."""
    fractions = _fraction_errors(assumed, cells, certainty)
    return {
        "parameters": certainty.determined,
        "fraction": {f"{bits:g}": errors for bits, errors in fractions.items()},
    }
