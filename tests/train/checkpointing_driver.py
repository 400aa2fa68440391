"""Trains runs whose checkpoints are slow to write, or fail; tells what happened while they were written.

    python checkpointing_driver.py RUNS.json OUT_FOLDER

RUNS.json: [{"overrides": […], "slow": {"rank": 0, "seconds": 0.2}, "signal_at": 5, "error_at": 5, "full_at": 3}]
`slow`: a shard of that rank takes so long. `stall`: seconds that the watchdog gives a save, instead of half an hour.
`signal_at`: SIGTERM to rank 0 when it begins that step. `error_at`: an exception there, on every process. `full_at`:
from there on, and when there is a checkpoint, the last rank's disk takes no file above 64 KiB.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from qatscale.config.recipe import load_run_config
from qatscale.engine.checkpoints import files
from qatscale.supervise import watchdog
from qatscale.supervise.watchdog import Watchdog
from qatscale.train.run import train

PROGRESS, WRITE = Watchdog.progress, files.write_shard
RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def observed(run: dict) -> dict:
    """Train a run; {"writes": [checkpoint's step, loop's step when its shard was begun, and when it was done, …]}."""
    slow = run.get("slow", {"rank": None})
    config = load_run_config("debug", run["overrides"])
    writes, at = [], 0

    def progress(self, step, slow=False):
        nonlocal at
        PROGRESS(self, step, slow)
        if slow or step == at:
            return
        at = step
        if step == run.get("signal_at") and RANK == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == run.get("error_at"):
            raise ValueError("made to fail")
        if step == run.get("full_at") and RANK == RANKS - 1:
            while not list((config.folder / "checkpoints").glob("step-*")):
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, LIMIT[1]))

    def write_shard(folder, rank, *rest):
        begun = at
        if rank == slow["rank"]:
            time.sleep(slow["seconds"])
        file = WRITE(folder, rank, *rest)
        writes.append([int(folder.name[-8:]), begun, at])
        return file

    Watchdog.progress, files.write_shard = progress, write_shard
    if "stall" in run:
        watchdog.SLOW = run["stall"]
    found = {"writes": writes, "error": ""}
    try:
        found["status"] = train(config).status
    except (ValueError, OSError) as error:  # from a job of one process
        found["error"] = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, LIMIT)
    return found


LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)
results = []
for run in json.loads(Path(sys.argv[1]).read_text()):
    results.append(observed(run))
    (Path(sys.argv[2]) / f"seen-{RANK}.json").write_text(json.dumps(results))
