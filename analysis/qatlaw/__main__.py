"""`python -m qatlaw`: the planner on a machine without qatscale."""

from __future__ import annotations

import sys

from qatlaw.cli import planner
from qatlaw.errors import InputError

EXIT_BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> None:
    try:
        planner(arguments, prog_name="python -m qatlaw")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
