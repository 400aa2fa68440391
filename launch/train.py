"""What every launcher starts: `deepspeed launch/train.py RECIPE key=value…`, on any number of processes.

The arguments are those of `qatscale train`. torchrun, srun and mpirun start it as well. The run's completion marker
(done.json in its folder) says that a run is finished, not the launcher's exit code.
"""

import sys

from qatscale.__main__ import start

if __name__ == "__main__":
    start(["train", *sys.argv[1:]])
