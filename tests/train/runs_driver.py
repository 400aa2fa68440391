"""Trains the runs that a JSON file lists, in this process, one after the other; a run may be told to kill itself.

    python runs_driver.py RUNS.json      [{"overrides": […], "branch_from": null, "kill_at": {"step": 7, "where": "batch"}}]

`where`: `batch` = SIGKILL when step `step` asks for its data, after the checkpoint and the switch that belong before it;
`commit` = SIGKILL when the checkpoint of step `step` is written but not yet committed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from qatscale.config import load_run_config
from qatscale.data.reader import BatchReader
from qatscale.engine import checkpoint
from qatscale.train.loop import train


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill_at: dict) -> None:
    read, commit = BatchReader.batch, checkpoint.commit

    def batch(self, step, rank=0, ranks=1):
        if step == kill_at["step"]:
            kill_myself()
        return read(self, step, rank, ranks)

    def committed(folder, manifest):
        if manifest.step == kill_at["step"]:
            kill_myself()
        return commit(folder, manifest)

    if kill_at["where"] == "batch":
        BatchReader.batch = batch
    else:
        checkpoint.commit = committed


for run in json.loads(Path(sys.argv[1]).read_text()):
    if run.get("kill_at"):
        arm(run["kill_at"])
    train(load_run_config(run.get("recipe", "debug"), run["overrides"]), run.get("branch_from"))
