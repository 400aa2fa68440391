"""launch/train.py with one rank that fails: FAULT=KIND:RANK:STEP, when that rank asks for the data of that step.

KIND: `error` raises, `kill` is SIGKILL, `stop` SIGSTOP, `sleep` a sleep without end; `none` does nothing.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np

from qatscale.data.reader import BatchReader

BATCH = BatchReader.batch
KIND, RANK, STEP = os.environ["FAULT"].split(":")
LAUNCH = Path(__file__).parents[2] / "launch" / "train.py"


def batch(self: BatchReader, step: int, *rest: int) -> np.ndarray:
    if step == int(STEP) and int(os.environ.get("RANK", 0)) == int(RANK):
        if KIND == "error":
            raise ValueError("this rank was made to fail")
        if KIND == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif KIND == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif KIND == "sleep":
            time.sleep(3600)
    return BATCH(self, step, *rest)


BatchReader.batch = batch  # type: ignore[method-assign]
sys.argv[0] = str(LAUNCH)
runpy.run_path(str(LAUNCH), run_name="__main__")
