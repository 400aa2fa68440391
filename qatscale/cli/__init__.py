"""The commands of `qatscale`. Each imports what it needs when it runs, so that --help and plan answer at once."""

from __future__ import annotations

import os
import signal
import sys
import time

from qatlaw.errors import InputError
from qatscale.errors import EXIT_BAD_INPUT, EXIT_REQUEUE

TRAINING = ("train", "resume", "branch")
"""Commands that several processes run together."""
_LATER = 5.0


def main(arguments: list[str] | None = None) -> None:
    """Run a command line. A wrong input is reported in one message, and the process exits with 2.

    In a job of many processes the first one reports it. The others wait a few seconds: the launcher ends them when the
    first one leaves, and an error of one of them alone is still reported.
    """
    command = (sys.argv[1:] if arguments is None else arguments)[:1]
    if command and command[0] in TRAINING:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: os._exit(EXIT_REQUEUE))  # until the run has handlers of its own
    from qatscale.cli.app import app

    try:
        app(arguments, prog_name="qatscale")
    except InputError as error:
        rank = int(os.environ.get("RANK", 0))
        time.sleep(_LATER if rank else 0)
        print(f"error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
