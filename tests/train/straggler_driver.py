"""As runs_driver.py, but the process of rank 1 waits before each core of attention, longer than all it computes."""

import json
import os
import sys
import time
from pathlib import Path

from qatscale.config.recipe import load_run_config
from qatscale.model import llama
from qatscale.train.run import train

ATTEND, WAITS = llama.attend, 0.1 if os.environ["RANK"] == "1" else 0.0


def attend(*given):
    time.sleep(WAITS)
    return ATTEND(*given)


llama.attend = attend
for run in json.loads(Path(sys.argv[1]).read_text()):
    train(load_run_config("debug", run["overrides"]))
