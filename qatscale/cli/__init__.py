"""`qatscale …`: a thin door. A command imports what it needs when it runs, so that --help and plan answer at once."""

from __future__ import annotations

import os
import sys

from qatscale.errors import EXIT_BAD_INPUT, UserError


def main(arguments: list[str] | None = None) -> None:
    """Run a command line. A wrong input is told in one message, by the first process only, and exits with 2."""
    from qatscale.cli.app import app

    try:
        app(arguments, prog_name="qatscale")
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
