"""The training loop: the optimizer steps of a run in order, with the switch to QAT before one of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from qatscale.config.schema import RunConfig
from qatscale.engine.spikes import Spike, SpikeGuard
from qatscale.engine.step import apply_settings, train_step
from qatscale.engine.topology import gather_stages
from qatscale.quant.report import merge_reports
from qatscale.schedule.timeline import Timeline, kept_steps
from qatscale.supervise.signals import Stopped, StopRequest
from qatscale.supervise.watchdog import Watchdog
from qatscale.train.checkpointing import AsyncCheckpointer
from qatscale.train.components import RunSetup, TrainingComponents
from qatscale.train.metrics import Meter
from qatscale.train.run_log import RunLog
from qatscale.train.validation import validation_losses

GC_INTERVAL = 100
"""Steps between two garbage collections, the same ones on all processes."""
SCALES_MOVE_WITHIN = 100
"""Steps after the switch, or after a later start, at which scales that still stand are an error."""


def run_steps(
    setup: RunSetup,
    components: TrainingComponents,
    log: RunLog,
    checkpointer: AsyncCheckpointer,
    watchdog: Watchdog,
    stop: StopRequest,
) -> None:
    """Take the optimizer steps from where the run starts to its end. Collective.

    Raises `Stopped` after saving, and `RollBack` where a spike takes the run back to a checkpoint.
    """
    config, timeline, first = setup.config, setup.timeline, setup.resume.step
    batches, validation = setup.batches, setup.validation
    runtime, topology, engine = components.runtime, components.topology, components.engine
    masters, plugin, qat_metrics = components.masters, components.plugin, components.qat_metrics
    guard = components.guard
    due = Due(config, timeline)
    moving = False
    meter = Meter(config, runtime, setup.precision)
    stopwatch = components.stopwatch
    timed = stopwatch if stopwatch and components.times_forward else nullcontext

    with checkpointer, collect_garbage_by_hand():
        for step in range(first, timeline.steps):
            if report := plugin.maybe_switch(step, masters):
                merged = merge_reports(gather_stages(report, topology), setup.weights.params)
                merged.check(setup.weights)
                log.switched(merged)
                meter.restart()
                guard.restart()
            settings = timeline.at(step)
            assert settings.quantized == (plugin.switched_at is not None), f"step {step}: the switch is out of step"
            apply_settings(engine, settings)
            compiles = step in (first, timeline.switch_step)
            watchdog.progress(step, slow=compiles)
            if settings.quantized and due.metrics(step + 1):
                qat_metrics.before_step()
            if stopwatch:
                stopwatch.on = due.metrics(step + 1)
            with meter.data():
                index = guard.state.batch_of(step)
                batch = torch.from_numpy(batches.batch(index, topology.place.data, topology.layout.data))
            for loss in train_step(engine, batch, config.batch.micro_batch, topology, timed):
                meter.add_loss(loss)
                watchdog.progress(step, slow=compiles)
            spike = guard.after_step()
            meter.end_step(updated=spike is None)

            done = step + 1
            watchdog.progress(done, slow=True)  # saving and evaluation may take long
            if spike is not None:
                pass_over(spike, step, config, guard, log)
            stopped_by = stop.agreed()
            if due.metrics(done) or stopped_by:
                counts = qat_metrics.counts() if settings.quantized else None
                record = meter.read(done, settings, engine, counts, stopwatch.read() if stopwatch else None)
                log.metrics(done, record | setup.tokens_by_source(done, guard.state))
                if meter.straggler is not None:
                    log.straggler(done, meter.straggler, record)
            log.step_done(done, components.compilation.news())
            if settings.quantized and not moving and done >= (timeline.switch_step or 0) + SCALES_MOVE_WITHIN:
                plugin.check_moving(masters)
                moving = True
            checkpointer.poll()
            save = due.checkpoint(done) or ("signal" if stopped_by else None)
            validate = validation is not None and due.validation(done)
            if save or validate:
                with meter.pause():
                    if save:
                        checkpointer.save(done, save)
                    if validate and validation is not None:
                        log.validation(done, validation_losses(engine, ["current"], validation, topology))
            if save or validate or done % GC_INTERVAL == 0:
                gc.collect()
            if stopped_by and done < timeline.steps:
                checkpointer.wait()
                raise Stopped(stopped_by)


class RollBack(Exception):  # noqa: N818 - no error
    """A spike takes the run back to its newest checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def pass_over(spike: Spike, step: int, config: RunConfig, guard: SpikeGuard, log: RunLog) -> None:
    """Deal with the spike of a 0-based step as `optimizer.on_spike` says. Its update was withheld."""
    action, count = config.optimizer.on_spike, guard.count()
    log.spike(step + 1, spike, action)
    if action == "stop" or count > config.optimizer.spike_limit:
        why = "" if action == "stop" else f", one more than optimizer.spike_limit = {count - 1}"
        fix = "Lower optimizer.learning_rate, or clip more (optimizer.gradient_clipping), in a new run or a branch."
        raise FloatingPointError(f"{spike} at step {step + 1}{why}. {fix}")
    if action == "rollback":
        raise RollBack(step)


@contextmanager
def collect_garbage_by_hand() -> Iterator[None]:
    """Python's own collections would interrupt a step, on every process another one, and the others would wait in their
    next collective. Tensors are freed by reference counts and do not need the collector."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


class Due:
    """The work that is due after so many optimizer steps."""

    def __init__(self, config: RunConfig, timeline: Timeline) -> None:
        self._log_interval = config.log_interval
        self._segment_ends = {segment.end for segment in timeline.segments}
        self._kept = set(kept_steps(timeline, config.checkpoint.keep_at))
        self._steps = timeline.steps
        self._save_every = self._interval(config.checkpoint.interval, config.tokens_per_step)
        self._validate_every = self._interval(config.evaluation.interval, config.tokens_per_step)

    @staticmethod
    def _interval(tokens: int | None, tokens_per_step: int) -> int | None:
        return None if tokens is None else max(1, round(tokens / tokens_per_step))

    def metrics(self, done: int) -> bool:
        """At the interval, and where one begins or ends that must not be averaged over: a segment, a resumed part."""
        return done % self._log_interval == 0 or done in self._segment_ends or self.checkpoint(done) is not None

    def checkpoint(self, done: int) -> str | None:
        """Why a checkpoint is due, or None."""
        if done == self._steps:
            return "end"
        if done in self._kept:
            return "boundary"
        return "interval" if self._save_every and done % self._save_every == 0 else None

    def validation(self, done: int) -> bool:
        return self._validate_every is not None and done % self._validate_every == 0 and done < self._steps
