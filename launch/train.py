"""What the DeepSpeed launcher starts: `deepspeed launch/train.py RECIPE key=value…`, on any number of processes.

The arguments are those of `qatscale train`; torchrun starts it as well. The run's completion marker (done.json in its
folder) says that a run is finished, not the launcher's exit code.
"""

import os
import sys

from qatscale.cli import main

if __name__ == "__main__":
    own = []
    for argument in sys.argv[1:]:
        if argument.startswith("--local_rank="):  # the launcher's way to tell the device
            os.environ.setdefault("LOCAL_RANK", argument.partition("=")[2])
        else:
            own.append(argument)
    main(["train", *own])
