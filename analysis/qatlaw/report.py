"""One HTML page that tells what the runs say: no script, no file beside it, readable on screen and on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from qatlaw.figures import SUBJECTS, Drawn, Evidence
from qatlaw.runs import LeftOut, counted
from qatlaw.summary import NONE, Rows, Summary, coefficient_rows, comparison_rows, curve_rows, quality_rows
from qatlaw.validation import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_RUNS = 40
"""Rows of the table of runs; a longer one is for programs."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #222; background: #fff;
       max-width: 52rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.about, figcaption, .small { color: #555; font-size: .86rem; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .86rem; }
th, td { padding: .22rem .8rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 1px solid #888; font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 1rem; } figure img { max-width: 100%; height: auto; display: block; }
.warning, .lacking { border-left: 4px solid #d55e00; padding: .35rem .8rem; margin: .5rem 0; background: #faf6f2; }
.lacking { border-color: #777; background: #f5f5f5; }
nav a { margin-right: 1rem; white-space: nowrap; } a { color: #0b5a8f; }
@media print { body { max-width: none; margin: 0; padding: 0; font-size: 10.5pt; } nav { display: none; }
  section, figure, table { break-inside: avoid; } h2 { break-after: avoid; } .warning, .lacking { background: none; } }
"""


@dataclass(frozen=True)
class Report:
    """What a page is made of."""

    evidence: Evidence
    created: str
    """A date and time, as it is to be read."""
    summaries: Sequence[Summary] = ()
    """Fits made on these runs; empty where the law was given, or none could be fitted."""
    comparison: Sequence[Comparison] = ()
    left_out: Sequence[LeftOut] = ()
    notices: Sequence[str] = ()
    no_law: str = ""
    """Why there is none."""

    @cached_property
    def drawn(self) -> tuple[Drawn, ...]:
        return tuple(draw(self.evidence) for draw in SUBJECTS)

    @cached_property
    def svg(self) -> dict[str, bytes]:
        """By name the figures that could be drawn."""
        return {one.name: image(one.figure, "svg") for one in self.drawn if one.figure is not None}


def write_report(report: Report, folder: Path) -> Path:
    """report.html, with the figures beside it as SVG and PNG for use elsewhere; the page needs neither."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for one in report.drawn:
        svg, png = (figures / f"{one.name}.{ending}" for ending in ("svg", "png"))
        if one.figure is not None:
            svg.write_bytes(report.svg[one.name])
            png.write_bytes(image(one.figure, "png"))
        else:  # an earlier report may have had more runs
            svg.unlink(missing_ok=True)
            png.unlink(missing_ok=True)
    page = folder / "report.html"
    page.write_text(html(report), encoding="utf-8")
    return page


def image(figure: Figure, ending: str) -> bytes:
    """The same bytes for the same runs: no date, no random names."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if ending == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "qatlaw"}):
        figure.savefig(buffer, format=ending, dpi=160, metadata=metadata)
    return buffer.getvalue()


def html(report: Report) -> str:
    """The whole page."""
    table = report.evidence.table
    title = f"Quantization-aware training: {table.source}"
    links = "\n".join(f'<a href="#{one.name}">{escape(one.title)}</a>' for one in report.drawn)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{len(table)} results, hash {table.hash}; made on {escape(report.created)}. Losses are '
        "validation losses in nats per token. N parameters, D tokens, B bits per quantized weight, f = D_qat / D the "
        "QAT fraction, S = D / (N B / 8) tokens per parameter byte.</p>",
        f"<nav>{links}</nav>",
        _warnings(report),
        *(_fit(summary) for summary in report.summaries),
        _comparison(report.comparison),
        *(_figure(one, report.svg.get(one.name)) for one in report.drawn),
        _runs(report),
        _left_out(report.left_out),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _warnings(report: Report) -> str:
    told = []
    laws = report.evidence.laws
    if report.evidence.table.synthetic:
        told.append("These runs were drawn from a made-up law: a demonstration, no measurement.")
    if laws is not None and laws.demonstration:
        told.append(f"The law is {laws.told}. Plan nothing by it.")
    if laws is None:
        told.append(f"No loss law: {report.no_law or 'none was given'} Figures that need one say so.")
    told += [f"{notice[0].upper()}{notice[1:]}." for notice in report.notices]
    return "\n".join(f'<div class="warning">{escape(line)}</div>' for line in told)


def _figure(one: Drawn, svg: bytes | None) -> str:
    heading = f'<section id="{one.name}"><h2>{escape(one.title)}</h2>'
    if svg is None:
        return f'{heading}<div class="lacking">Not drawn. It needs {escape(one.lacking)}</div></section>'
    data = base64.b64encode(svg).decode()
    warnings = "".join(f'<div class="warning">{escape(line)}</div>' for line in one.warnings)
    return (
        f'{heading}{warnings}<figure><img alt="{escape(one.title)}. {escape(one.caption)}" '
        f'src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(one.caption)}</figcaption></figure></section>"
    )


def _fit(summary: Summary) -> str:
    result = summary.result
    form, starts = result.law.form, result.starts
    warnings = "".join(f'<div class="warning">{escape(line)}</div>' for line in summary.warnings)
    told = (
        f"L = {form.formula}. {form.source}; coefficients fitted here on {len(result.table)} runs, {summary.scheme} "
        f"and full precision. {starts.agreeing} of {starts.tried} cold starts found this optimum. {summary.noise} "
        "R² and MAE in sample."
    )
    curves = rows_html(curve_rows(summary)) if summary.curves else ""
    return (
        f"<section><h2>The law: {escape(summary.label)}</h2><p>{escape(told)}</p>{warnings}"
        f"{rows_html(coefficient_rows(summary))}{rows_html(quality_rows(summary))}{curves}</section>"
    )


def _comparison(comparison: Sequence[Comparison]) -> str:
    if not comparison:
        return ""
    refused = [f"{one.form.name}: {reason}" for one in comparison for reason in one.refused]
    notes = "".join(f'<p class="small">{escape(line)}</p>' for line in refused)
    return (
        "<section><h2>Laws compared on runs they were not fitted on</h2><p>The best by held-out error first; errors in "
        f"nats.</p>{rows_html(comparison_rows(comparison))}{notes}</section>"
    )


def _runs(report: Report) -> str:
    table = report.evidence.table
    rows: Rows = [("run", "scheme", "N", "bits", "D", "f", "loss (nats)")]
    for row in table.frame.head(MOST_RUNS).to_dict("records"):
        total = row["tokens_fp"] + row["tokens_qat"]
        rows.append(
            (
                str(row.get("name", NONE)),
                row["scheme"],
                f"{row['n_params']:,.0f}",
                NONE if row["scheme"] == "fp" else f"{row['bits']:g}",
                f"{total:,.0f}",
                f"{row['tokens_qat'] / total:.3f}",
                f"{row['loss']:.4f}",
            )
        )
    more = len(table) - MOST_RUNS
    told = f'<p class="small">and {more} more</p>' if more > 0 else ""
    return f"<section><h2>Runs</h2>{rows_html(rows)}{told}</section>"


def _left_out(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return ""
    rows: Rows = [("run left out", "why"), *((one.name, one.reason) for one in left_out[:MOST_RUNS])]
    reasons = ", ".join(f"{count} {reason}" for reason, count in counted(left_out).items())
    return f"<section><h2>Left out</h2><p>{escape(reasons)}.</p>{rows_html(rows)}</section>"


def rows_html(rows: Rows) -> str:
    """A table; columns of numbers are set to the right."""
    headers, *body = rows
    numeric = [bool(body) and all(_is_number(row[i]) for row in body) for i in range(len(headers))]

    def cells(tag: str, row: tuple[str, ...]) -> str:
        classes = [' class="n"' if right else "" for right in numeric]
        return "".join(f"<{tag}{own}>{escape(cell)}</{tag}>" for own, cell in zip(classes, row, strict=True))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
    return f"<table><thead><tr>{cells('th', headers)}</tr></thead><tbody>{lines}</tbody></table>"


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return cell == NONE
    return True
