"""One run, from its configuration to its completion marker. `train` and `run_steps` are the order of things."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qatscale.config import precision_of, recipe_hash
from qatscale.config.schema import RunConfig
from qatscale.engine.checkpoints.save_load import describe
from qatscale.engine.initialize import apply_settings
from qatscale.engine.runtime import start_runtime
from qatscale.engine.step import train_step
from qatscale.engine.topology import gather_stages
from qatscale.model.sizes import count_parameters
from qatscale.quant.report import merge_reports
from qatscale.timeline import Timeline, build_timeline, kept_steps
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.evaluate import validation_losses
from qatscale.train.final import data_metrics, final_metrics, final_views
from qatscale.train.garbage import Garbage
from qatscale.train.job import Job, Plan, assemble, plan_run
from qatscale.train.meter import Meter
from qatscale.train.prefetch import Prefetch
from qatscale.train.run_log import RunLog
from qatscale.train.saver import Saver
from qatscale.train.signals import StopRequest
from qatscale.train.watch import Watch, collective_timeout


@dataclass(frozen=True)
class Outcome:
    status: Literal["done", "stopped"]
    step: int
    final: dict[str, Any] | None
    """Final metrics by their stable names; None where a signal stopped the run."""


def train(config: RunConfig, branch_from: str | None = None, *, linger: bool = True) -> Outcome:
    """Train the run that `config` describes, from wherever it stands. Every process of a job calls it.

    A run that is done is returned as it is; one whose folder exists goes on from its newest checkpoint; else it starts
    fresh, or from `branch_from` (a checkpoint folder, a run folder, `RUN@STEP`). UserError for whatever is wrong with
    the input, before the first step. `linger`: at the end draw the run's figures and wait for its upload to MLflow;
    a worker of a study does not, and starts the next run at once.
    """
    plan = plan_run(config, branch_from)
    if plan is None:
        folder = RunFolder(config.folder)
        return Outcome("done", build_timeline(config).steps, folder.final)
    runtime = start_runtime(collective_timeout(config.engine.stall_timeout))
    with Watch(runtime, config.folder / "logs", config.engine.stall_timeout) as watch:
        job = assemble(plan, runtime)
        n_params = count_parameters(config.model).total
        with RunLog(
            config, plan.timeline, plan.start, runtime, plan.ds_config, n_params, watch, plan.notices, linger=linger
        ) as log:
            try:
                return run_steps(plan, job, log)
            finally:
                job.compilation.close()
                job.engine.destroy()


def run_steps(plan: Plan, job: Job, log: RunLog) -> Outcome:
    """The optimizer steps from where the run starts to its end, then the final evaluation."""
    config, timeline, first = plan.config, plan.timeline, plan.start.step
    runtime, topology, engine, masters, plugin = job.runtime, job.topology, job.engine, job.masters, job.plugin
    batches, validation = plan.batches, plan.validation
    due = Due(config, timeline)
    meter = Meter(config, runtime, precision_of(log.ds_config))
    recipe = recipe_hash(log.folder.path / "recipe.yaml") if runtime.is_main else ""  # the first process's counts

    def save(step: int, reason: str) -> None:
        draft = describe(
            masters,
            runtime,
            step=step,
            tokens=step * config.tokens_per_step,
            reason=reason,
            kept=reason in ("boundary", "end"),
            recipe_hash=recipe,
            data=batches.stream.manifest.fingerprint,
            plugin=plugin.state(),
            layout=asdict(topology.layout),
        )
        saver.save(draft)

    saver = Saver(
        log.folder.checkpoints,
        masters,
        runtime,
        background=config.checkpoint.background,
        keep=config.checkpoint.keep,
        saved=lambda manifest, path: log.checkpoint(manifest.step, path, manifest.reason, manifest.kept),
        notice=log.console.notice,
    )
    log.watch.waits_for = saver.waited_for
    upcoming = Prefetch(
        lambda step: batches.batch(step, topology.data_rank, topology.data_ranks),
        *(first, timeline.steps),
        pin=runtime.device.type == "cuda",
    )
    with StopRequest(runtime) as stop, saver, upcoming, Garbage() as garbage:
        for step in range(first, timeline.steps):
            cold = step in (first, timeline.switch_step)  # compilation, and a branch begins with the switch
            if cold:
                with meter.pause():
                    if report := plugin.after_step(step, masters):
                        log.switched(merge_reports(gather_stages(report, topology)))
                        meter.cold()
            settings = timeline.at(step)
            assert settings.quantized == (plugin.switched_at is not None), f"step {step}: the switch is out of step"
            apply_settings(engine, settings)
            log.watch.mark(step, slow=cold)
            if settings.quantized and due.metrics(step + 1):
                job.qat_metrics.before_step()
            with meter.data():
                batch = upcoming.take(step)
            for loss in train_step(engine, batch, config.batch.micro_batch, topology):
                meter.add_loss(loss)
                log.watch.mark(step, slow=cold)
            meter.end_step()

            done = step + 1
            log.watch.mark(done, slow=True)
            stopped_by = stop.agreed()
            if due.metrics(done) or stopped_by:
                counts = job.qat_metrics.counts() if settings.quantized else None
                log.metrics(done, meter.read(done, settings, engine, counts))
            log.console.advance(done)
            saver.poll()
            reason = due.checkpoint(done) or ("signal" if stopped_by else None)
            if news := job.compilation.news():
                log.console.notice(f"step {done}: {news}")
            garbage.step(done, pauses=bool(reason) or due.validation(done))
            if reason or due.validation(done):
                with meter.pause():
                    if reason:
                        save(done, reason)
                    if due.validation(done):
                        log.validation(done, validation_losses(engine, ["current"], validation, topology))
            if stopped_by and done < timeline.steps:
                saver.wait()
                log.stopped(done, stopped_by)
                return Outcome("stopped", done, None)

    if plugin.switched_at is not None and first < timeline.steps:
        plugin.check_moving(masters)
    losses = validation_losses(engine, final_views(config), validation, topology)
    log.validation(timeline.steps, losses)
    final = final_metrics(config, timeline, losses, log.folder)
    final |= data_metrics(batches.stream.manifest, validation)
    log.finished(timeline.steps, final)
    return Outcome("done", timeline.steps, final)


class Due:
    """What has to happen after so many optimizer steps."""

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
