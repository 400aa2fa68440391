"""`qatscale …`: a thin door. A command imports what it needs when it runs, so that --help and plan answer at once."""

from __future__ import annotations

import os
import sys
import time

from qatlaw.errors import InputError
from qatscale.errors import EXIT_BAD_INPUT

_LATER = 5.0


def main(arguments: list[str] | None = None) -> None:
    """Run a command line. A wrong input is told in one message and exits with 2.

    In a job of many processes the first one tells it. The others wait a moment before they do: the launcher ends them
    when the first one leaves, and what only one of them has met is told all the same.
    """
    from qatscale.cli.app import app

    try:
        app(arguments, prog_name="qatscale")
    except InputError as error:
        rank = int(os.environ.get("RANK", 0))
        time.sleep(_LATER if rank else 0)
        print(f"error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
