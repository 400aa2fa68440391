"""Trains the runs that a JSON file lists, in this process, one after the other; some are killed or stopped half-way.

    python runs_driver.py RUNS.json     [{"overrides": […], "branch_from": null, "kill_at": {"step": 7, "where": "…"}}]

`kill_at`: SIGKILL on all processes. `where`: `batch` = when step `step` asks for its data, after the checkpoint and the
switch that belong before it; `commit` = when the checkpoint of step `step` is written but not yet committed.
`stop_at`: {"step": 5, "rank": 1, "signal": "SIGUSR1"} = that signal, to that process alone, when it asks for step 5.
"""

import json
import os
import signal
import sys
from pathlib import Path

from qatscale.config import load_run_config
from qatscale.engine.checkpoints import save_load as checkpoint
from qatscale.train.loop import train
from qatscale.train.prefetch import Prefetch

TAKE, COMMIT = Prefetch.take, checkpoint.commit


def arm(run: dict) -> None:
    """Set the traps of a run, and remove those of the run before."""
    kill_at = run.get("kill_at", {"step": None, "where": None})
    stop_at = run.get("stop_at", {"step": None, "rank": None})

    def take(self, step):
        if step == kill_at["step"] and kill_at["where"] == "batch":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_at["step"] and int(os.environ["RANK"]) == stop_at["rank"]:
            os.kill(os.getpid(), signal.Signals[stop_at["signal"]])
        return TAKE(self, step)

    def commit(folder, manifest):
        if manifest.step == kill_at["step"] and kill_at["where"] == "commit":
            os.kill(os.getpid(), signal.SIGKILL)
        return COMMIT(folder, manifest)

    Prefetch.take, checkpoint.commit = take, commit


for run in json.loads(Path(sys.argv[1]).read_text()):
    arm(run)
    outcome = train(load_run_config(run.get("recipe", "debug"), run["overrides"]), run.get("branch_from"))
    assert outcome.status == ("stopped" if "stop_at" in run else "done"), outcome
