"""Trains the runs that a JSON file lists, in this process, one after the other; some are killed or stopped half-way.

    python runs_driver.py RUNS.json     [{"overrides": […], "branch_from": null, "kill_at": {"step": 7, "where": "…"}}]

`kill_at`: SIGKILL on all processes. `where`: `batch` = when step `step` asks for its data, after the checkpoint and the
switch that belong before it; `commit` = when the checkpoint of step `step` is written but not yet committed.
`stop_at`: {"step": 5, "rank": 1, "signal": "SIGUSR1"} = that signal, to that process alone, when it asks for step 5.

Every run checks what its first forward pass after the switch sees: no weight lies beyond its quantizer's levels.
"""

import json
import os
import signal
import sys
from pathlib import Path

from qatscale.config.recipe import load_run_config
from qatscale.data.reader import BatchReader
from qatscale.engine.checkpoints import files as checkpoint
from qatscale.quant.bit_widths import SCALE_FLOOR
from qatscale.quant.plugin import QatPlugin
from qatscale.quant.selection import fake_quant_modules
from qatscale.train.run import train

BATCH, COMMIT, MAYBE_SWITCH = BatchReader.batch, checkpoint.commit, QatPlugin.maybe_switch


def maybe_switch(plugin, step, masters):
    """Lets the switched layers check, in their first forward pass, the weights and scales that they compute with."""
    report = MAYBE_SWITCH(plugin, step, masters)
    for name, layer in fake_quant_modules(plugin._model) if report else ():
        if layer.quantizer.name != "binary":

            def check(layer, _, name=name):
                hooks.pop(name).remove()
                scale = layer.weight_scale.detach().float().clamp_min(SCALE_FLOOR)
                groups = layer.weight.detach().float().unflatten(-1, (-1, layer.group_size or layer.weight.shape[1]))
                largest = (groups / scale.view(*groups.shape[:2], 1)).abs().max().item()
                assert largest <= layer.quantizer.qp, f"{name}: a weight of {largest} scales at the switch"

            hooks[name] = layer.register_forward_pre_hook(check)
    return report


hooks = {}
QatPlugin.maybe_switch = maybe_switch


def arm(run: dict) -> None:
    """Set the traps of a run, and remove those of the run before."""
    kill_at = run.get("kill_at", {"step": None, "where": None})
    stop_at = run.get("stop_at", {"step": None, "rank": None})

    def batch(self, step, *rest):
        if step == kill_at["step"] and kill_at["where"] == "batch":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_at["step"] and int(os.environ["RANK"]) == stop_at["rank"]:
            os.kill(os.getpid(), signal.Signals[stop_at["signal"]])
        return BATCH(self, step, *rest)

    def commit(folder, manifest):
        if manifest.step == kill_at["step"] and kill_at["where"] == "commit":
            os.kill(os.getpid(), signal.SIGKILL)
        return COMMIT(folder, manifest)

    BatchReader.batch = batch
    checkpoint.commit = commit


for run in json.loads(Path(sys.argv[1]).read_text()):
    arm(run)
    outcome = train(load_run_config(run.get("recipe", "debug"), run["overrides"]), run.get("branch_from"))
    assert not hooks, f"layers that computed nothing after the switch: {sorted(hooks)}"
    assert outcome.status == ("stopped" if "stop_at" in run else "done"), outcome
