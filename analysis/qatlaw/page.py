"""One HTML page about the runs and their law: without scripts or other files, readable on screen and on paper."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from qatlaw.errors import InputError
from qatlaw.figures.evidence import Drawn, Evidence, Laws
from qatlaw.figures.landscape import drawn_landscape
from qatlaw.figures.subjects import draw_all
from qatlaw.files import write_atomic
from qatlaw.findings import findings
from qatlaw.landscape import Landscape
from qatlaw.planner_law import load_law
from qatlaw.runs import Collected, LeftOut, counted
from qatlaw.summary import (
    NONE,
    Rows,
    Summary,
    coefficient_rows,
    comparison_rows,
    curve_rows,
    form_named,
    quality_rows,
    rivals,
    scheme_of,
    summarise,
)
from qatlaw.table import RunTable
from qatlaw.validation import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_RUNS = 40
"""Rows of the table of runs; all of them are in a file beside the page."""
RUNS = "runs.csv"
_NUMBER = re.compile(rf"{NONE}|[-+]?(nan|inf|[0-9,.]+(e[-+]?[0-9]+)?)")


@dataclass(frozen=True)
class Report:
    """The content of a page."""

    evidence: Evidence
    created: str
    """Date and time, for people."""
    summaries: Sequence[Summary] = ()
    """Fits made on these runs; empty where the law was given, or none could be fitted."""
    comparison: Sequence[Comparison] = ()
    left_out: Sequence[LeftOut] = ()
    notices: Sequence[str] = ()
    no_law: str = ""
    landscapes: Sequence[Landscape] = ()

    @cached_property
    def drawn(self) -> tuple[Drawn, ...]:
        landscapes = (drawn_landscape(one, f"landscape_{place}") for place, one in enumerate(self.landscapes, 1))
        return (*draw_all(self.evidence), *landscapes)

    @property
    def lacking(self) -> dict[str, list[str]]:
        """By what they need, the titles of the figures that could not be drawn."""
        titles: dict[str, list[str]] = {}
        for one in self.drawn:
            if one.figure is None:
                titles.setdefault(one.lacking, []).append(one.title)
        return titles

    @cached_property
    def svg(self) -> dict[str, bytes]:
        """By name, the figures that could be drawn."""
        return {one.name: image(one.figure, "svg") for one in self.drawn if one.figure is not None}


def compose(
    runs: Collected, form: str = "qat_unified", scheme: str | None = None, law: str | None = None, *,
    resamples: int = 200, compare: bool = True, landscapes: Sequence[Landscape] = (),
) -> Report:  # fmt: skip
    """The report of these runs. Without `law` (a name or the path of a fit.json) the form is fitted to them.

    InputError where `law`, `form` or `scheme` is wrong. A table that determines no law is reported without one.
    """
    chosen, table = form_named(form), runs.table
    laws, summaries, compared, no_law = None, [], [], ""
    if law is not None:
        laws = _given_law(law, scheme_of(table, scheme, either=True), table)
    else:
        try:
            summaries = summarise(chosen, table, scheme_of(table, scheme, either=True), resamples=resamples)
            laws = _laws_of(summaries)
        except InputError as error:
            if scheme is not None and error.key == "--scheme":
                raise
            no_law = str(error)
    if compare and summaries:
        compared = rivals(table, summaries[0].scheme)
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    evidence = Evidence(table, laws, runs.records)
    return Report(evidence, created, summaries, compared, runs.left_out, runs.notices, no_law, landscapes)


def _given_law(name: str, scheme: str, table: RunTable) -> Laws:
    given = load_law(name, effective=table.effective_bits)
    width = given.range["bits"][0] if given.law.form.one_width else None
    return Laws({width: given.law}, given.source, given.range, scheme, demonstration=given.synthetic)


def _laws_of(summaries: list[Summary]) -> Laws | None:
    """None for laws without an optimal fraction: most figures are about it."""
    first = summaries[0]
    if not first.result.law.form.has_fraction:
        return None
    ranges = first.result.table.ranges
    widths = [one.bits for one in summaries if one.bits is not None]
    if widths:
        ranges |= {"bits": (min(widths), max(widths))}
    return Laws(
        by_width={one.bits: one.result.law for one in summaries},
        source=f"{first.result.law.form.name}, fitted on these runs",
        ranges=ranges,
        scheme=first.scheme,
        demonstration=first.result.table.synthetic,
    )


def write_report(report: Report, folder: Path) -> Path:
    """report.html, with the figures beside it as SVG and PNG for use elsewhere; the page needs neither."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for one in report.drawn:
        svg, png, numbers = (figures / f"{one.name}.{ending}" for ending in ("svg", "png", "csv"))
        if one.figure is not None:
            write_atomic(svg, report.svg[one.name])
            write_atomic(png, image(one.figure, "png"))
            if one.table is not None:
                write_atomic(numbers, one.table.drop(columns="rest", errors="ignore").to_csv(index=False).encode())
        else:  # an earlier report may have had more runs
            svg.unlink(missing_ok=True)
            png.unlink(missing_ok=True)
            numbers.unlink(missing_ok=True)
    write_atomic(folder / RUNS, report.evidence.table.frame.to_csv(index=False).encode())
    page = folder / "report.html"
    write_atomic(page, html(report).encode())
    return page


def image(figure: Figure, ending: str) -> bytes:
    """The same bytes for the same runs: without date and random names."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if ending == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "qatlaw"}):
        figure.savefig(buffer, format=ending, dpi=160, metadata=metadata)
    return buffer.getvalue()


def template(name: str) -> Template:
    """One of the package's templates."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["numeric_columns"] = _numeric_columns
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(name)


def html(report: Report) -> str:
    table = report.evidence.table
    return template("report.html.jinja").render(
        report=report, coefficient_rows=coefficient_rows, quality_rows=quality_rows, curve_rows=curve_rows,
        comparison_rows=comparison_rows, table=table, title=f"Quantization-aware training: {Path(table.source).name}",
        warnings=_warnings(report), runs=_run_rows(table), all_runs=RUNS, more_runs=len(table) - MOST_RUNS,
        findings=findings(report.evidence, report.summaries, report.drawn), missing=_missing(report),
        reasons=", ".join(f"{count} {reason}" for reason, count in counted(report.left_out).items()),
        left_out=[("run left out", "why"), *((one.name, one.reason) for one in report.left_out[:MOST_RUNS])],
    )  # fmt: skip


def _warnings(report: Report) -> list[str]:
    lines = []
    laws = report.evidence.laws
    if report.evidence.table.synthetic:
        lines.append("These runs were drawn from a made-up law: this is a demonstration, not a measurement.")
    if laws is not None and laws.demonstration:
        lines.append(f"The law is {laws.source}. Plan nothing by it.")
    return [*lines, *(f"{notice[0].upper()}{notice[1:]}." for notice in report.notices)]


def _missing(report: Report) -> list[tuple[str, str]]:
    """(what, what it needs) of everything that these runs do not give."""
    law = [] if report.evidence.laws else [("Loss law", report.no_law or "none was given.")]
    return [*law, *((", ".join(titles), f"needs {needed}") for needed, titles in report.lacking.items())]


def _run_rows(table: RunTable) -> Rows:
    rows: Rows = [("run", "scheme", "N", "bits", "effective bits", "D", "f", "loss (nats)")]
    for row in table.frame.head(MOST_RUNS).to_dict("records"):
        total = row["tokens_fp"] + row["tokens_qat"]
        bits = NONE if row["scheme"] == "fp" else f"{row['bits']:g}"
        stored = row.get("effective_bits")
        effective = NONE if stored is None or math.isnan(stored) else f"{stored:.3f}"
        numbers = f"{row['n_params']:,.0f}", bits, effective, f"{total:,.0f}", f"{row['tokens_qat'] / total:.3f}"
        rows.append((str(row.get("name", NONE)), row["scheme"], *numbers, f"{row['loss']:.4f}"))
    return rows


def _numeric_columns(rows: Rows) -> list[bool]:
    headers, *body = rows
    return [bool(body) and all(_NUMBER.fullmatch(row[i]) for row in body) for i in range(len(headers))]
