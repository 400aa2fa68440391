"""The commands of `qatscale`. Each imports what it needs when it runs, so that --help and plan answer at once."""

from __future__ import annotations

import os
import sys
import time

from qatlaw.errors import InputError
from qatscale.errors import EXIT_BAD_INPUT, EXIT_FAILED, fault

_LATER = 5.0


def main(arguments: list[str] | None = None) -> None:
    """Run a command line. A wrong input is reported in one message, and the process exits with 2.

    So is a fault of the machine (disk, permission) and a diverged run, with exit code 1; a run's log has the traceback.
    In a job of many processes the first one reports it. The others wait a few seconds: the launcher ends them when the
    first one leaves, and an error of one of them alone is still reported.
    """
    from qatscale.cli.app import app

    try:
        app(arguments, prog_name="qatscale")
    except InputError as error:
        rank = int(os.environ.get("RANK", 0))
        time.sleep(_LATER if rank else 0)
        print(f"error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (OSError, FloatingPointError) as error:
        if fault(error) is None:
            raise
        print("\n".join([f"error: {fault(error)}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        sys.exit(EXIT_FAILED)
