"""`python -m qatlaw`: the planner on a machine without qatscale. The same as `qatscale plan`, but for what qatscale
knows of recipes and GPUs: give --params and --peak-flops instead of --recipe and --gpu."""

from __future__ import annotations

import argparse
import json
import sys

from qatlaw.errors import LawError
from qatlaw.plan.answer import Answer, Table
from qatlaw.plan.options import GROUPS, read_request
from qatlaw.plan.questions import answer

EXIT_BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qatlaw", description=__doc__)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            group.add_argument(option.flag, metavar=option.metavar, help=option.help.replace("%", "%%"))
    parser.add_argument("--json", action="store_true", help="Print JSON for programs.")
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    try:
        found = answer(read_request(given))
    except LawError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else text(found))
    return 0


def text(found: Answer) -> str:
    """An answer as plain text."""
    lines = [found.title, "", *_aligned(found.table), ""]
    if found.law is not None:
        lines.append(f"loss law: {found.law.source}")
    lines += found.notes
    lines += [found.missing] if found.missing else []
    lines += [f"warning: {warning}" for warning in found.warnings]
    if found.overrides:
        lines += ["", " ".join((*found.command, *found.overrides))]
    return "\n".join(lines)


def _aligned(table: Table) -> list[str]:
    rows = [table.headers, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.headers))]
    return [
        "  ".join((row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))))
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
