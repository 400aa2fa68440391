"""`python -m qatlaw`: the planner on a machine without qatscale; `python -m qatlaw judge`: laws against tables."""

from __future__ import annotations

import sys

import typer

from qatlaw.cli import planner
from qatlaw.errors import InputError
from qatlaw.judge_cli import judge

EXIT_BAD_INPUT = 2


judge_alone = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
judge_alone.command()(judge)


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["judge"]:
            judge_alone(words[1:], prog_name="python -m qatlaw judge")
        else:
            planner(words, prog_name="python -m qatlaw")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
