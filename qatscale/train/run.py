"""A run from its configuration to its completion marker."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from qatlaw.bit_widths import bits_label
from qatlaw.text import plural
from qatscale.config.amounts import format_amount
from qatscale.config.recipe import recipe_hash, recorded_yaml
from qatscale.config.schema import RunConfig
from qatscale.engine.runtime import Runtime, start_runtime, together
from qatscale.schedule.build import build_timeline
from qatscale.supervise.claims import Claim, hold_run
from qatscale.supervise.signals import Stopped, StopRequest
from qatscale.supervise.watchdog import Watchdog, collective_timeout
from qatscale.tracking.follower import start_follower
from qatscale.tracking.new_run import create_run_folder
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.checkpointing import AsyncCheckpointer
from qatscale.train.components import ResumePlan, RunSetup
from qatscale.train.evaluate import evaluate_final
from qatscale.train.loop import RollBack, run_steps
from qatscale.train.resume import plan_resume
from qatscale.train.run_log import RunLog
from qatscale.train.setup import build, decide, resolved_settings, roll_back

FAILED_PATIENCE = 5.0
"""Seconds that a run which failed waits for its upload; launchers kill what is left of a job after 30."""


@dataclass(frozen=True)
class Outcome:
    status: Literal["done", "stopped"]
    step: int
    final: dict[str, Any] | None
    """Final metrics by their stable names; None where a signal stopped the run."""
    signal: int = 0
    """The signal that stopped it, or came too late for that; 0 without one."""


def train(
    config: RunConfig, branch_from: str | None = None, *, linger: bool = True, take_over: bool = False
) -> Outcome:
    """Train the run that `config` describes, from its newest state. Every process of a job calls it.

    A run that is done is returned as it is. One whose folder exists continues from its newest checkpoint. Any other
    starts fresh, or from `branch_from` (a checkpoint folder, a run folder, `RUN@STEP`). UserError for whatever is wrong
    with the input, before the first step. `linger`: at the end draw the run's figures and wait for its upload to
    MLflow; a worker of a study does not, and starts the next run at once. `take_over`: also from a process that may
    still train it.
    """
    with StopRequest() as stop:
        outcome = _train_unless_done(config, branch_from, stop, linger, take_over)
    return replace(outcome, signal=outcome.signal or stop.received)


def _train_unless_done(
    config: RunConfig, branch_from: str | None, stop: StopRequest, linger: bool, take_over: bool
) -> Outcome:
    setup = decide(config, branch_from)
    if setup is None:
        return _done(config)
    runtime = start_runtime(collective_timeout(config.engine.stall_timeout))
    with _only_writer(setup, branch_from, runtime, take_over) as resume:
        stop.join(runtime)
        if resume is None:
            return _done(config)
        return _train(replace(setup, resume=resume), runtime, stop, linger)


def _done(config: RunConfig) -> Outcome:
    return Outcome("done", build_timeline(config).steps, RunFolder(config.folder).final)


@contextmanager
def _only_writer(
    setup: RunSetup, branch_from: str | None, runtime: Runtime, take_over: bool
) -> Iterator[ResumePlan | None]:
    """A context in which no other job writes the run's folder, with where the run begins now; None: it is done.

    Collective. Before it, another job may have trained on.
    """
    claims: list[Claim] = []

    def claim() -> ResumePlan | None:
        claims.append(hold_run(setup.config.folder, take_over=take_over, notice=print))
        RunFolder(setup.config.folder).records()  # a damaged line is refused before more follow it
        return plan_resume(setup.config, setup.timeline, branch_from)

    try:
        yield together(claim if runtime.is_main else None, runtime)[0]
    finally:
        for held in claims:
            held.close("released")


def _train(setup: RunSetup, runtime: Runtime, stop: StopRequest, linger: bool) -> Outcome:
    log = RunLog(setup, runtime, linger=linger)
    with Watchdog(runtime, log.folder.logs, setup.config.engine.stall_timeout, log.failed) as watchdog:
        components = build(setup, runtime)
        log.hosts = watchdog.hosts
        if runtime.is_main:
            _open_folder(log)
        with _uploaded(log, linger), log.recording(watchdog):
            _introduce(log, watchdog.clock_notices)
            try:
                stop.check_now()
                checkpointer = AsyncCheckpointer(
                    log.folder.checkpoints,
                    setup.config,
                    components,
                    watchdog,
                    recipe_hash=recipe_hash(log.folder.path / "recipe.yaml") if runtime.is_main else "",
                    data=setup.batches.manifest,
                    saved=log.checkpoint,
                    notice=log.notice,
                )
                while True:
                    try:
                        run_steps(setup, components, log, checkpointer, watchdog, stop)
                        break
                    except RollBack as spike:
                        setup = roll_back(setup, components, spike.step)
                        log.rolled_back(setup.resume.step)
                return Outcome("done", setup.timeline.steps, evaluate_final(setup, components, log, stop))
            except Stopped as stopped:
                log.stopped(log.step, stopped.number)
                return Outcome("stopped", log.step, None, stopped.number)
            finally:
                components.engine.destroy()


def _open_folder(log: RunLog) -> None:
    setup, resume = log.setup, log.resume
    if not resume.resumes:
        create_run_folder(
            log.folder.path, recipe=recorded_yaml(setup.config), ds_config=setup.ds_config, timeline=setup.timeline,
            n_params=log.n_params, command=sys.argv, parent=resume.parent, hosts=log.hosts,
            resolved=resolved_settings(setup),
        )  # fmt: skip
    log.folder.append("resume" if resume.resumes else "start", step=resume.step, hosts=log.hosts)


def _introduce(log: RunLog, clock_notices: Sequence[str]) -> None:
    setup, config, timeline, resume = log.setup, log.config, log.timeline, log.resume
    log.notice(
        f"{config.name}: {format_amount(log.n_params)} parameters, {config.qat.scheme}"
        + (f" at {bits_label(config.qat.bits)}" if timeline.switch_step is not None else "")
        + f", {format_amount(timeline.tokens)} tokens in {plural(timeline.steps, 'step')} of "
        f"{timeline.tokens_per_step:,} (micro-batch {config.batch.micro_batch} x accumulation "
        f"{setup.ds_config['gradient_accumulation_steps']} x {plural(log.runtime.ranks, 'process')}), "
        f"{setup.precision} ZeRO-{setup.ds_config['zero_optimization']['stage']} on {log.runtime.device_name}"
    )
    if timeline.switch_step is not None:
        log.notice(
            f"switch to QAT before step {timeline.switch_step:,}: {timeline.qat_fraction:.2%} of the tokens, "
            f"at {timeline.qat_lr_ratio:.4g} x the full-precision rate"
        )
    if resume.parent and not resume.resumes:
        log.notice(f"branched from {resume.parent['folder']}@{resume.parent['step']}")
    elif resume.resumes:
        log.notice(f"resume from step {resume.step}: {resume.checkpoint or 'the run has no checkpoint'}")
    for notice in [*clock_notices, *setup.notices]:
        log.notice(f"note: {notice}")


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
        if message := follower.finish(*patience) if linger else follower.refusal():
            log.notice(message)
