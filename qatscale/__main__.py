"""`python -m qatscale …`: the `qatscale` command, also as what a launcher starts on every process.

    torchrun --nproc-per-node 2 -m qatscale train RECIPE key=value…
    deepspeed --num_gpus 2 --module qatscale train RECIPE key=value…

DeepSpeed's launcher adds an argument of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qatscale.cli import main


def start(arguments: Sequence[str]) -> None:
    """Run a command line on this process of a job."""
    own = []
    for argument in arguments:
        if argument.startswith("--local_rank="):  # DeepSpeed's way to name the device
            os.environ.setdefault("LOCAL_RANK", argument.partition("=")[2])
        else:
            own.append(argument)
    sys.argv[1:] = own
    main()


if __name__ == "__main__":
    start(sys.argv[1:])
