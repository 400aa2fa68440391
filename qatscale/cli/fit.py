"""`qatscale fit` and `qatscale report`: fit a law to runs, and write a page about both."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qatlaw.errors import InputError
from qatlaw.text import listed, plural
from qatscale.cli.terminal import Json, console, say, working
from qatscale.errors import UserError
from qatscale.new_folder import check_place

if TYPE_CHECKING:
    from qatlaw.runs import Collected
    from qatlaw.summary import Rows, Summary


def _source(text: str, metavar: str | None = None) -> Any:
    return typer.Option(rich_help_panel="Where the runs are (one of them)", metavar=metavar, help=text)


Experiment = Annotated[str | None, _source("Finished runs of an MLflow experiment: qatscale.", "NAME")]
Table = Annotated[
    Path | None,
    _source(
        "A .csv or .parquet: n_params, bits, tokens_fp and tokens_qat (or tokens and qat_fraction), loss, scheme; "
        "seed, if there are repeats."
    ),
]
Column = Annotated[
    list[str] | None, _source("A column of --table that has another name: loss=val_loss.", "NAME=COLUMN")
]
Runs = Annotated[Path | None, _source("A folder of run folders: runs.")]
Uri = Annotated[
    str | None, typer.Option(help="MLflow store of --experiment. [default: MLFLOW_TRACKING_URI, or ./mlflow.db]")
]
Form = Annotated[
    str,
    typer.Option(help="qat_unified: one law for all bit widths; qat_per_bits: one for each; or a rival law by name."),
]
Scheme = Annotated[str | None, typer.Option(help="sequential or fused, if the runs have both.")]
Resamples = Annotated[int, typer.Option(help="Resamples of the bootstrap behind the intervals; 0: no intervals.")]
NoCompare = Annotated[
    bool,
    typer.Option("--no-compare", help="Leave out the rival laws, which are judged by runs that no law was fitted on."),
]


def fit(
    experiment: Experiment = None,
    table: Table = None,
    column: Column = None,
    runs: Runs = None,
    uri: Uri = None,
    form: Form = "qat_unified",
    scheme: Scheme = None,
    bits: Annotated[
        Literal["nominal", "effective"],
        typer.Option(help="B of the law: bits of a weight in the blocks, or stored bits per parameter of each model."),
    ] = "nominal",
    out: Annotated[Path, typer.Option(help="File for the law; with qat_per_bits a file per bit width.")] = Path(
        "fit.json"
    ),
    resamples: Resamples = 200,
    no_compare: NoCompare = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the cold starts and of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit the loss law to finished runs; print coefficients with intervals, quality and rival laws; write fit.json."""
    from qatlaw.summary import form_named, rivals, scheme_of, summarise, write_files

    chosen = form_named(form)
    collected, where = collect_runs(experiment, table, runs, uri, column, scheme)
    if bits == "effective":
        if chosen.one_width:
            raise UserError("--bits", bits, f"{form} is a law of one nominal width.", "Fit qat_unified.")
        collected = replace(collected, table=collected.table.on_effective_bits)
    kind = scheme_of(collected.table, scheme)
    if out.is_dir():
        raise UserError("--out", str(out), "is a folder.", "Name a file in it: fit.json.")
    check_place("--out", out.parent)
    with working("fitting"):
        summaries = summarise(chosen, collected.table, kind, resamples=resamples, seed=seed)
    compared = []
    if not no_compare:
        with working("fitting the rival laws without the largest models and the longest runs"):
            compared = rivals(collected.table, kind, seed=seed)
    paths = write_files(summaries, out)
    logged = [_log(where, summary, path) for summary, path in zip(summaries, paths, strict=True)] if where else []
    if as_json:
        left_out = [{"name": one.name, "reason": one.reason} for one in collected.left_out]
        files = [json.loads(path.read_bytes()) for path in paths]
        for file in files:
            file.pop("bootstrap", None)
        print(json.dumps({"fits": files, "files": list(map(str, paths)), "left_out": left_out}, indent=2))
        return
    _print_fit(collected, summaries, compared, paths, [run_id for run_id in logged if run_id])


def report(
    experiment: Experiment = None,
    table: Table = None,
    column: Column = None,
    runs: Runs = None,
    uri: Uri = None,
    form: Form = "qat_unified",
    scheme: Scheme = None,
    law: Annotated[
        str | None,
        typer.Option(metavar="LAW", help="A law to draw instead of fitting one: path of a fit.json, or synthetic."),
    ] = None,
    landscape: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Also show this folder of `qatscale landscape`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, and the figures as SVG and PNG.")] = Path("report"),
    resamples: Resamples = 200,
    no_compare: NoCompare = False,
) -> None:
    """Write one self-contained HTML page about runs: the law, its figures, and which runs were left out."""
    from qatlaw.landscape import read_landscape
    from qatlaw.page import compose, write_report

    landscapes = [read_landscape(folder) for folder in landscape or ()]
    collected, _ = collect_runs(experiment, table, runs, uri, column, scheme)
    _say_left_out(collected)
    check_place("--out", out)
    with working("fitting" if law is None else "drawing"):
        content = compose(
            collected, form, scheme, law, resamples=resamples, compare=not no_compare, landscapes=landscapes
        )
        page = write_report(content, out)
    print(f"drawn: {', '.join(one.title for one in content.drawn if one.figure is not None) or 'nothing'}")
    for needed, titles in content.lacking.items():
        say(f"not drawn: {', '.join(titles)}; needs {needed}")
    if content.no_law:
        print(f"no loss law: {content.no_law}")
    print(f"{page}  (figures as SVG and PNG in {page.parent / 'figures'})")


# --- sources ---


def collect_runs(
    experiment: str | None,
    table: Path | None,
    runs: Path | None,
    uri: str | None,
    column: list[str] | None = None,
    scheme: str | None = None,
) -> tuple[Collected, tuple[str, str] | None]:
    """The runs, and (URI, experiment) if they come from MLflow."""
    given = {"--experiment": experiment, "--table": table, "--runs": runs}
    named = [option for option, value in given.items() if value is not None]
    if len(named) != 1:
        problem = f"{' and '.join(named)} are given." if named else "no source of runs is given."
        raise UserError("source", None, problem, f"Give one of {', '.join(given)}.")
    if uri is not None and experiment is None:
        raise UserError("--uri", uri, "has no effect without --experiment.", "Leave it out.")
    from qatlaw import api
    from qatscale.config.places import without_credentials
    from qatscale.tracking.refusals import shown
    from qatscale.tracking.store import quiet_mlflow, resolve_uri

    if table is not None:
        return api.from_table(table, _columns(column), scheme), None
    if column:
        raise UserError("--column", column[0], "has no effect without --table.", "Leave it out.")
    if runs is not None:
        return api.from_folder(runs), None
    assert experiment is not None
    resolved = resolve_uri(uri)
    if resolved is None:
        raise UserError("MLFLOW_TRACKING_URI", "none", "means no tracking.", "Give --uri, --runs or --table.")
    try:
        with working(f"reading experiment {experiment}"), quiet_mlflow():
            return api.from_experiment(experiment, resolved), (resolved, experiment)
    except InputError:
        raise
    except Exception as error:  # MLflow, its store and the network raise errors of every kind
        raise UserError("tracking URI", without_credentials(resolved), f"gives no runs: {shown(error)}") from None


def _columns(given: list[str] | None) -> dict[str, str]:
    """--column loss=val_loss as our name to the table's."""
    columns = {}
    for text in given or ():
        name, _, own = text.partition("=")
        if not own:
            raise UserError("--column", text, "must be NAME=COLUMN.", "Write --column loss=val_loss.")
        columns[name] = own
    return columns


def _log(where: tuple[str, str], summary: Summary, path: Path) -> str | None:
    """The MLflow run of the fit; None, with a warning, where MLflow fails. The file has the law either way."""
    from qatlaw.mlflow_runs import log_fit
    from qatscale.config.places import without_credentials
    from qatscale.tracking.mlflow_sync import shown
    from qatscale.tracking.store import quiet_mlflow

    uri, experiment = where
    try:
        with quiet_mlflow():
            return log_fit(uri, experiment, summary.file, path, f"fit {summary.label}")
    except Exception as error:  # MLflow, its store and the network raise errors of every kind
        print(f"warning: {without_credentials(uri)} did not take the fit: {shown(error)}", file=sys.stderr)
        return None


# --- printing ---


def _print_fit(
    collected: Collected, summaries: list[Summary], compared: list[Any], paths: list[Path], logged: list[str]
) -> None:
    from qatlaw.summary import coefficient_rows, comparison_rows, curve_rows, quality_rows

    _say_left_out(collected)
    for summary in summaries:
        result = summary.result
        title = f"{summary.label}: {plural(len(result.table), 'run')} of {collected.table.source}, {summary.scheme}"
        _print_rows(title, coefficient_rows(summary), ("parameter", "meaning"))
        _print_rows("How it fits its runs", quality_rows(summary))
        if summary.curves:
            _print_rows("Optimal fraction of every measured U-curve", curve_rows(summary))
        say(f"{result.starts.agreeing} of {result.starts.tried} cold starts found this optimum. {summary.noise}")
        for line in summary.warnings:
            say(f"warning: {line}", style="yellow")
    if compared:
        _print_rows("Laws compared on runs they were not fitted on", comparison_rows(compared))
        for one in compared:
            for reason in one.refused:
                say(f"{one.form.name}: {reason}")
    for notice in collected.notices:
        say(f"warning: {notice}", style="yellow")
    in_mlflow = f", logged to MLflow as run {', '.join(logged)}" if logged else ""
    say(f"{', '.join(map(str, paths))}{in_mlflow}; `qatscale plan --law {paths[0]}` plans by it")


def _print_rows(title: str, rows: Rows, words: Sequence[str] | None = None) -> None:
    from qatlaw.text_table import TextTable

    headers, *body = rows
    console().print(TextTable(headers, words=headers[:1] if words is None else words, title=title, rows=body))
    print()


def _say_left_out(collected: Collected) -> None:
    from qatlaw.runs import counted

    for reason, count in counted(collected.left_out).items():
        names = [one.name for one in collected.left_out if one.reason.startswith(reason)]
        say(f"left out: {count} {reason} ({listed(names)})")
