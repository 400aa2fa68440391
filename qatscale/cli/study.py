"""`qatscale study`: plan a grid of runs as a tree, train it with any number of workers, watch it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatlaw.text import listed, plural
from qatlaw.text_table import TextTable
from qatscale.cli import study_run
from qatscale.cli.fit import Column, Experiment, Runs, Table, Uri
from qatscale.cli.terminal import Json, console, say
from qatscale.errors import UserError

if TYPE_CHECKING:  # imported when the command runs
    from qatscale.study.plan import Information, StudyPlan

study = typer.Typer(help="Studies: grids of runs that share their trunks.", no_args_is_help=True)
study.command()(study_run.run)
study.command()(study_run.work)
study.command()(study_run.status)
study.command()(study_run.average)


@study.command()
def plan(
    file: Annotated[Path, typer.Argument(help="A study file: analysis/guides/recipe-reference.md has the format.")],
    law: Annotated[
        str | None,
        typer.Option(
            metavar="LAW", help="Law under which the runs' information is predicted: path of a fit.json, or synthetic."
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of a run's log loss: 0.002 is 0.2 %.")] = 0.002,
    experiment: Experiment = None,
    table: Table = None,
    column: Column = None,
    runs: Runs = None,
    uri: Uri = None,
    workers: Annotated[int, typer.Option(min=1, max=100_000, help="Workers, for time and disk.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="GPU of each worker, for the hours: H200.")] = None,
    mfu: Annotated[float | None, typer.Option(help="With --gpu: share of its peak that training reaches: 0.4.")] = None,
    as_json: Json = False,
) -> None:
    """Print the cheapest tree of runs that covers a study: where each run branches, its tokens, FLOPs, time and disk.

    With --law it also prints how certain the law's coefficients and the optimal fraction can become. These runs and
    those that exist (--experiment, --table or --runs) count.
    """
    import numpy as np

    from qatlaw.planner_law import load_law
    from qatscale.cli.fit import collect_runs
    from qatscale.study.plan import as_json as plan_as_json
    from qatscale.study.plan import plan_study

    if not noise > 0:
        raise UserError("--noise", noise, "must be a standard deviation above 0.")
    has_runs = any(value is not None for value in (experiment, table, runs))
    if law is None and has_runs:
        raise UserError("--law", None, "missing: existing runs count only for the information.", "Add it.")
    speed = _flops_per_second(gpu, mfu)
    assumed = None if law is None else load_law(law, effective=lambda _, bits: np.asarray(bits, np.float64))
    known = None
    if assumed is not None and has_runs:
        existing = collect_runs(experiment, table, runs, uri, column)[0].table
        known = (existing.on_effective_bits if assumed.effective else existing).frame
    planned = plan_study(file, workers, assumed, noise, known)
    if as_json:
        print(json.dumps(plan_as_json(planned), indent=2))
        return
    _print_tree(planned, speed)
    if planned.information is not None:
        _print_information(planned.information)


# --- printing ---


def _print_tree(plan: StudyPlan, speed: float | None) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.tree import Tree as Branches

    from qatscale.config.amounts import format_amount
    from qatscale.train.console import format_duration

    out, tree, cost = console(), plan.tree, plan.cost
    root = Branches(f"Study {plan.grid.name}: run @ step it branches at, tokens to train")
    branches: dict[str | None, Branches] = {None: root}
    for job in tree.jobs:
        at = f" @{job.start:,}" if job.parent else ""
        label = f"{job.route.name}{at}  {format_amount(job.new_tokens)}"
        branches[job.route.name] = branches[job.parent].add(label)
    Console(highlight=False, width=2000).print(root, soft_wrap=True)  # the terminal folds a long line, nothing is cut
    out.print()
    table = TextTable(("cost", "as a tree", "each run alone", "share"), words=["cost"])
    table.add_row("runs", f"{len(tree.jobs):,}", f"{len(tree.jobs):,}", "")
    for name, shared, alone, shown in (
        ("tokens", tree.tokens, tree.tokens_alone, format_amount),
        ("FLOPs", tree.flops, tree.flops_alone, lambda value: f"{value:.3g}"),
    ):
        table.add_row(name, shown(shared), shown(alone), f"{shared / alone:.1%}")
    out.print(table)
    out.print()
    _print_bits(plan)
    amount = f"{cost.makespan / cost.flops:.1%} of the work" if cost.workers > 1 else "all of the work"
    taken = f", {format_duration(cost.makespan / speed)}" if speed else ""
    longest = f", {format_duration(cost.longest / speed)}" if speed else ""
    say(
        f"time: {plural(cost.workers, 'worker')}: {amount}{taken}; the longest chain of "
        f"runs, which no number of workers shortens: {cost.longest / cost.flops:.1%}{longest}"
    )
    say(
        f"disk: checkpoints take {decimal(cost.disk)} at the fullest moment and {decimal(cost.disk_at_end)} at the "
        "end, when one per run is left, and those of keep_at"
    )
    if repeated := plan.grid.repeated:
        say(
            f"trained once: {plural(len(repeated), 'cell')} of the grids that other cells repeat. The first: "
            f"{repeated[0][0]} is {repeated[0][1]}"
        )
    if left_out := plan.grid.left_out:
        names = listed([name for name, _ in left_out])
        why = f"whose schedule does not fit ({names}). The first: {left_out[0][1]}"
        say(f"left out: {plural(len(left_out), 'run')} {why}")
    for warning in plan.grid.warnings:
        say(f"warning: {warning}", style="yellow")


def _print_bits(plan: StudyPlan) -> None:
    """The effective bits of each size beside the nominal ones."""
    from qatlaw.bit_widths import bits_label
    from qatscale.config.amounts import format_amount
    from qatscale.study.plan import effective_bits

    found: dict[int, dict[float, float]] = {}
    for run in plan.grid.runs:
        if run.config.qat.scheme != "fp":
            sizes = found.setdefault(run.params, {})
            sizes.setdefault(run.config.qat.bits, effective_bits(run))
    widths = sorted({bits for row in found.values() for bits in row})
    if not widths:
        return
    title = "Effective bits: stored bits a parameter, with scales, embedding and norms"
    table = TextTable(("parameters", *map(bits_label, widths)), title=title)
    for params, row in sorted(found.items()):
        table.add_row(format_amount(params), *(f"{row[bits]:.3f}" if bits in row else "–" for bits in widths))
    console().print(table)
    console().print()


def _flops_per_second(gpu: str | None, mfu: float | None) -> float | None:
    """FLOPs a second of a worker; None where --gpu and --mfu are not given."""
    from qatscale.config.sizes import known_peak

    if gpu is None and mfu is None:
        return None
    if gpu is None or mfu is None:
        raise UserError("--gpu" if gpu is None else "--mfu", None, "missing.", "Give both, or neither.")
    if not 0 < mfu <= 1:
        raise UserError("--mfu", mfu, "must be a share of the device's peak, above 0 and at most 1: 0.4.")
    return known_peak(gpu) * mfu


def _print_information(information: Information) -> None:
    from statistics import median

    from qatlaw.bit_widths import bits_label
    from qatlaw.information import error_text

    out, law = console(), information.law
    for scheme, (before, after) in information.certainties.items():
        columns = {"standard error": after} if before is None else {"before": before, "after": after}
        title = (
            f"The most that the {scheme} runs show at {information.noise:.2%} noise, if this law holds: {law.source}"
        )
        table = TextTable(("parameter", *columns), words=["parameter"], title=title)
        for parameter in law.law.form.parameters:
            errors = [certainty.determined[parameter.name] for certainty in columns.values()]
            table.add_row(parameter.name, *(error_text(parameter, error) for error in errors))
        by_column = [information.fraction_errors(certainty) for certainty in columns.values()]
        for bits in by_column[0]:
            middle = [median(math.inf if error is None else error for error in errors[bits]) for errors in by_column]
            texts = (error_text(None, None if math.isinf(error) else error) for error in middle)
            table.add_row(f"optimal fraction at {bits_label(bits)} (median)", *texts)
        out.print(table)
    say(
        "Standard errors, of coefficients in per cent: the inverted Fisher information of the runs, (1/s²) Σ g gᵀ with "
        "g = d ln L / dθ (Cramér–Rao), and the delta method for the fraction. Each scheme is fitted together with the "
        "full-precision runs. A coefficient with an error above 30 % counts as not determined. QAT from scratch and "
        "PTQ carry no information under a law that describes neither. Noise that branches share with their trunk is "
        "not counted."
    )
