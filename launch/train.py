"""What every launcher starts: `deepspeed launch/train.py RECIPE key=value…`, on any number of processes.

The arguments are those of `qatscale train`. torchrun, srun and mpirun start it as well: it takes its place in the job
from whichever environment they give. The run's completion marker (done.json in its folder) says that a run is finished,
not the launcher's exit code.
"""

import os
import sys

from qatscale.cli import main
from qatscale.cli.lasting import Lasting
from qatscale.engine.environment import adopt
from qatscale.errors import EXIT_BAD_INPUT, UserError

if __name__ == "__main__":
    own = []
    for argument in sys.argv[1:]:
        if argument.startswith("--local_rank="):  # the launcher's way to tell the device
            os.environ.setdefault("LOCAL_RANK", argument.partition("=")[2])
        else:
            own.append(argument)
    try:
        os.environ.update(adopt(os.environ))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    # torch's C++ side prints a stack of its own for every connection that breaks, below the failure that we tell
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    main(["train", *own])
