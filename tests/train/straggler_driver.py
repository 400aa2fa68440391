"""As runs_driver.py, but the process of rank 1 computes the core of attention many times over."""

import json
import os
import sys
from pathlib import Path

from qatscale.config.recipe import load_run_config
from qatscale.model import llama
from qatscale.train.run import train

ATTEND, TIMES = llama.attend, 100 if os.environ["RANK"] == "1" else 1


def attend(*given):
    for _ in range(TIMES):
        mixed = ATTEND(*given)
    return mixed


llama.attend = attend
for run in json.loads(Path(sys.argv[1]).read_text()):
    train(load_run_config("debug", run["overrides"]))
