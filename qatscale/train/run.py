"""A run from its configuration to its completion marker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from qatscale.config import recipe_hash
from qatscale.config.schema import RunConfig
from qatscale.engine.runtime import start_runtime
from qatscale.schedule.build import build_timeline
from qatscale.supervise.watchdog import Watchdog, collective_timeout
from qatscale.tracking.follower import start_follower
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.checkpointing import AsyncCheckpointer
from qatscale.train.evaluate import evaluate_final
from qatscale.train.loop import run_steps
from qatscale.train.run_log import RunLog
from qatscale.train.setup import build, decide

FAILED_PATIENCE = 5.0
"""Seconds that a run which failed waits for its upload; launchers kill what is left of a job after 30."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Literal["done", "stopped"]
    step: int
    final: dict[str, Any] | None
    """Final metrics by their stable names; None where a signal stopped the run."""


def train(config: RunConfig, branch_from: str | None = None, *, linger: bool = True) -> Outcome:
    """Train the run that `config` describes, from its newest state. Every process of a job calls it.

    A run that is done is returned as it is. One whose folder exists continues from its newest checkpoint. Any other
    starts fresh, or from `branch_from` (a checkpoint folder, a run folder, `RUN@STEP`). UserError for whatever is wrong
    with the input, before the first step. `linger`: at the end draw the run's figures and wait for its upload to
    MLflow; a worker of a study does not, and starts the next run at once.
    """
    setup = decide(config, branch_from)
    if setup is None:
        return Outcome("done", build_timeline(config).steps, RunFolder(config.folder).final)
    runtime = start_runtime(collective_timeout(config.engine.stall_timeout))
    log = RunLog(setup, runtime, linger=linger)
    with Watchdog(runtime, log.folder.logs, config.engine.stall_timeout, log.failed) as watchdog:
        components = build(setup, runtime)
        log.open(watchdog.hosts)
        with _uploaded(log, linger), log.recording(watchdog):
            try:
                checkpointer = AsyncCheckpointer(
                    log.folder.checkpoints,
                    setup.config,
                    components,
                    watchdog,
                    recipe_hash=recipe_hash(log.folder.path / "recipe.yaml") if runtime.is_main else "",
                    data=setup.batches.stream.manifest.fingerprint,
                    saved=log.checkpoint,
                    notice=log.notice,
                )
                done = run_steps(setup, components, log, checkpointer, watchdog)
                if done < setup.timeline.steps:
                    return Outcome("stopped", done, None)
                return Outcome("done", done, evaluate_final(setup, components, log))
            finally:
                components.engine.destroy()


@contextmanager
def _uploaded(log: RunLog, linger: bool) -> Iterator[None]:
    """A context whose records a follower uploads to MLflow. With `linger` it ends when the upload does, or soon."""
    if not log.runtime.is_main:
        yield
        return
    follower = start_follower(log.folder, log.config.tracking.uri)
    if linger and (message := follower.first_answer()):
        log.notice(message)
    patience = [FAILED_PATIENCE]
    try:
        yield
        patience = []
    finally:
        if linger and (message := follower.finish(*patience)):
            log.notice(message)
