"""`qatscale judge`: laws against tables of runs, as text, a page and JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatlaw.errors import InputError
from qatlaw.files import write_atomic

if TYPE_CHECKING:  # --help does not wait for pandas
    from qatlaw.judge import Candidate

LEGEND = (
    "off: the law less the measurement, in nats, ± half its 95 % interval over trunks where three or more were "
    "measured; gap: loss above full precision; by: mean absolute error of the gap over the mean gap; runs: with a "
    "loss/with a gap; *: outside the range of the law's own runs; fit: fitted on this table, so without a rank."
)


def judge(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="TABLE", help="Tables by name, or .csv files of runs. [default: all by name]"),
    ] = None,
    law: Annotated[
        list[str] | None,
        typer.Option(metavar="LAW", help="Judge these laws: published ones by name, or files of `qatscale fit`."),
    ] = None,
    refit: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="Also fit every form of law on this table, and judge it on the others."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for judge.html, judge.json and the figure.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Which law predicts which runs? Published laws, and yours, against tables of runs."""
    from qatlaw.judge import HOLDS, fraction_rows, published, refitted, unheld, verdict_rows
    from qatlaw.judge import judge as judged
    from qatlaw.laws.named import NAMED
    from qatlaw.plan.answer import plain
    from qatlaw.tables import load_table, table_names
    from qatlaw.text import terminal_width, wrapped
    from qatlaw.text_table import TextTable

    chosen = [load_table(name) for name in tables or table_names()]
    candidates = [published(one) for one in NAMED.values()] if law is None else [_candidate(name) for name in law]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # where that is impossible, before the fits
    notes: list[str] = []
    if refit is not None:
        fits, notes = refitted(load_table(refit))
        candidates += fits
    verdicts = judged(candidates, chosen)
    fractions = {table.label: fraction_rows(candidates, table) for table in chosen}
    notes += list(dict.fromkeys(f"{one.table}: {one.outside}" for one in verdicts if one.outside))
    where = unheld(verdicts)
    if where:
        notes.insert(0, f"Every law is off by more than {HOLDS:.0%} of the gap at: {'; '.join(where)}")
    content = {
        "tables": [one.about.model_dump() | {"name": one.name, "rows": len(one.runs)} for one in chosen],
        "laws": [{"name": one.name, "source": one.source, "fitted_on": one.fitted_on} for one in candidates],
        "verdicts": plain(verdicts),
        "fractions": {
            name: [dict(zip(headers, row, strict=True)) for row in rows] for name, (headers, *rows) in fractions.items()
        },
        "not_held": where,
        "notes": notes,
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    by_table = [(table, [one for one in verdicts if one.table == table.label]) for table in chosen]
    if out is not None:
        from qatlaw.figures.judged import CAPTION, draw_judged
        from qatlaw.page import image, template

        figure = draw_judged(candidates, chosen)
        page = template("judge.html.jinja").render(
            title="Laws judged on tables of runs",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            judged=[(table, verdict_rows(own, full=True)) for table, own in by_table],
            fractions=fractions,
            laws=[("law", "source"), *((one.name, one.source) for one in candidates)],
            legend=LEGEND,
            notes=notes,
            caption=CAPTION,
            svg=image(figure, "svg"),
        )
        files = {"judge.html": page.encode(), "judge.json": text.encode(), "judged.png": image(figure, "png")}
        for name, data in files.items():
            write_atomic(out / name, data)
    if as_json:
        print(text)
        return
    width = terminal_width()
    for table, own in by_table:
        print(f"{table.label}: {table.about.title}\n")
        if own:
            headers, *rows = verdict_rows(own)
            print(TextTable(headers, words=headers[:2], drop=("runs",), rows=rows).text(width), end="\n\n")
        else:
            print("No law speaks of its quantized runs.\n")
        headers, *rows = fractions[table.label]
        if rows:
            print(TextTable(headers, words=headers[:1], rows=rows).text(width), end="\n\n")
    print("\n".join(wrapped(sentence, width) for sentence in (LEGEND, *notes)))
    if out is not None:
        print(out / "judge.html")


def _candidate(name: str) -> Candidate:
    """InputError where it is neither a published law nor a fit.json."""
    from qatlaw.fit_file import read_fit
    from qatlaw.judge import of_file, published
    from qatlaw.laws.named import NAMED

    if name in NAMED:
        return published(NAMED[name])
    if not Path(name).is_file():
        known = ", ".join(NAMED)
        raise InputError("--law", name, f"is neither a published law ({known}) nor a file.", "Fit one: qatscale fit.")
    return of_file(Path(name).stem, read_fit(name))
