"""`python -m qatscale …`: the `qatscale` command, also as what a launcher starts on every process.

    torchrun --nproc-per-node 2 -m qatscale train RECIPE key=value…
    deepspeed --num_gpus 2 --module qatscale train RECIPE key=value…

It takes its place in the job from whichever environment torchrun, DeepSpeed, srun or mpirun give.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qatscale.cli import TRAINING, main
from qatscale.errors import EXIT_BAD_INPUT, UserError
from qatscale.supervise.launchers import launcher_environment


def start(arguments: Sequence[str]) -> None:
    """Run a command line on this process of a job."""
    own = []
    for argument in arguments:
        if argument.startswith("--local_rank="):  # DeepSpeed's way to name the device
            os.environ.setdefault("LOCAL_RANK", argument.partition("=")[2])
        else:
            own.append(argument)
    if own and own[0] in TRAINING:
        try:
            os.environ.update(launcher_environment(os.environ))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT)
        # torch's C++ side prints a stack of its own for every connection that breaks, below the failure we report
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    main(own)


if __name__ == "__main__":
    start(sys.argv[1:])
