"""Everything a run tells: its folder, the console, MLflow. One process writes; the others keep a log file each."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qatscale.config import precision_of, resolved_yaml
from qatscale.config.amounts import format_amount
from qatscale.config.sizes import count_parameters
from qatscale.engine.runtime import Runtime
from qatscale.quant.plugin import SwitchReport
from qatscale.supervise.failure_report import Fault
from qatscale.supervise.watchdog import Watch
from qatscale.tracking.compare import perplexity
from qatscale.tracking.follower import Follower, NoFollower, start_follower
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.components import RunSetup
from qatscale.train.console import run_console

SCALES_FLOORED_WARNING = 0.01
"""Share of scales at their floor above which a run warns."""
FAILED_PATIENCE = 5.0
"""Seconds that a run which failed waits for its upload; launchers kill what is left of a job after 30."""


def _line_format(rank: int) -> logging.Formatter:
    """`2026-11-22T08:30:00.123Z host rank 3 WARNING qatscale: …`: logs of many hosts sort into one."""
    host = socket.gethostname()
    line = f"%(asctime)s.%(msecs)03dZ {host} rank {rank} %(levelname)s %(name)s: %(message)s"
    formatter = logging.Formatter(line, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    return formatter


class RunLog:
    """Use it as a context: entering opens or resumes the run's folder, leaving with an error records the error."""

    def __init__(self, setup: RunSetup, runtime: Runtime, watch: Watch, *, linger: bool = True) -> None:
        config, timeline, start = setup.config, setup.timeline, setup.resume
        self.config, self.timeline, self.start, self.runtime, self.watch = config, timeline, start, runtime, watch
        self.ds_config, self.notices, self.linger = setup.ds_config, setup.notices, linger
        self.n_params = count_parameters(config.model).total
        self.folder = RunFolder(config.folder)
        self.console = run_console(runtime.rank, timeline.steps, start.step)
        self.follower: Follower = NoFollower()
        self._step = start.step
        """Steps done, as far as told: where an error is placed."""
        self._warned = False
        self._file: logging.FileHandler | None = None

    def __enter__(self) -> Self:
        if self.runtime.is_main:
            if not self.start.resumes:
                RunFolder.create(
                    self.folder.path,
                    recipe=resolved_yaml(self.config),
                    ds_config=self.ds_config,
                    timeline=self.timeline,
                    n_params=self.n_params,
                    command=sys.argv,
                    parent=self.start.parent,
                    hosts=self.watch.hosts,
                )
            self.folder.append(
                "resume" if self.start.resumes else "start", step=self.start.step, hosts=self.watch.hosts
            )
            self.follower = start_follower(self.folder, self.config.tracking.uri)
        self.console.__enter__()
        self._introduce()
        self.folder.logs.mkdir(parents=True, exist_ok=True)
        self._file = logging.FileHandler(self.folder.logs / f"rank-{self.runtime.rank}.log")
        self._file.setFormatter(_line_format(self.runtime.rank))
        logging.getLogger().addHandler(self._file)
        self.watch.on_failure = self._record
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.watch.settle(error)
        self.console.__exit__(kind, error, trace)
        if self.runtime.is_main:
            patience = [] if error is None else [FAILED_PATIENCE]
            if self.linger and (message := self.follower.finish(*patience)):
                self.console.notice(message)
            self.folder.close()
        self.watch.on_failure = None
        if self._file is not None:
            logging.getLogger().removeHandler(self._file)
            self._file.close()

    def _record(self, first: Fault, own: Fault) -> None:
        """The job has failed. May come from another thread, while this one hangs in a collective."""
        logging.getLogger("qatscale").error(f"{own.text}\n{first.sentence}")
        if self.runtime.is_main:
            self.folder.append(
                "failed", step=max(first.step, self._step), error=first.error, rank=first.rank, host=first.host
            )

    def _introduce(self) -> None:
        config, runtime, timeline = self.config, self.runtime, self.timeline
        accumulation = self.ds_config["gradient_accumulation_steps"]
        stage = self.ds_config["zero_optimization"]["stage"]
        self.console.notice(
            f"{config.name}: {format_amount(self.n_params)} parameters, {config.qat.scheme}"
            + (f" at {config.qat.bits:g} bits" if timeline.switch_step is not None else "")
            + f", {format_amount(timeline.tokens)} tokens in {timeline.steps:,} steps of "
            f"{format_amount(timeline.tokens_per_step)} (micro-batch {config.batch.micro_batch} x accumulation "
            f"{accumulation} x {runtime.ranks} processes), {precision_of(self.ds_config)} ZeRO-{stage} "
            f"on {runtime.device_name}"
        )
        if timeline.switch_step is not None:
            self.console.notice(
                f"switch to QAT before step {timeline.switch_step:,}: {timeline.qat_fraction:.2%} of the tokens, "
                f"at {timeline.qat_lr_ratio:.4g} x the full-precision rate"
            )
        if self.start.parent and not self.start.resumes:
            self.console.notice(f"branched from {self.start.parent['folder']}@{self.start.parent['step']}")
        elif self.start.checkpoint is not None:
            self.console.resume(self.start.checkpoint, self.start.step)
        for notice in [*self.watch.clock_notices, *self.notices]:
            self.console.notice(f"note: {notice}")

    # one verb per event; on other processes none does anything

    def metrics(self, step: int, record: dict[str, Any]) -> None:
        self._step = step
        if self.runtime.is_main:
            self.console.metrics(self.folder.append("metrics", step=step, **record))
            floored = record.get("scales_floored", 0)
            if floored > SCALES_FLOORED_WARNING and not self._warned:
                self._warned = True
                self.console.notice(
                    f"warning: {floored:.1%} of the quantizer scales lie at their floor, where a row's weights are all "
                    "clipped and do not train. Lower qat.scale_lr_ratio and branch from before the switch."
                )

    def switched(self, report: SwitchReport) -> None:
        if self.runtime.is_main:
            self.folder.append("switch", step=report.step, report=report.to_dict())
            self.console.switch(report)

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """losses: view -> mean loss in nats."""
        if self.runtime.is_main:
            for view, loss in losses.items():
                record = {"tokens": step * self.config.tokens_per_step, "view": view, "loss": loss}
                self.console.validation(
                    self.folder.append("validation", step=step, **record, perplexity=perplexity(loss))
                )

    def checkpoint(self, step: int, path: Path, reason: str, kept: bool) -> None:
        if self.runtime.is_main:
            self.folder.append("checkpoint", step=step, path=str(path), reason=reason, kept=kept)
            self.console.checkpoint(path, step)

    def stopped(self, step: int, number: int) -> None:
        if self.runtime.is_main:
            name = signal.Signals(number).name
            self.folder.append("stopped", step=step, signal=name)
            self.console.notice(f"{name}: saved at step {step}; the same command goes on from there")

    def finished(self, step: int, final: dict[str, Any]) -> None:
        if self.runtime.is_main:
            if self.linger:
                self._draw()
            self.folder.finish(step, final)

    def _draw(self) -> None:
        """timeline.png and loss.png in the run's figures. A figure that fails must not cost the run its end."""
        from qatscale.schedule.show import draw
        from qatscale.tracking.curves import draw_loss_curves

        try:
            draw(self.timeline, self.config, self.folder.figures / "timeline.png")
            draw_loss_curves([self.folder], self.folder.figures / "loss.png")
        except Exception as error:  # a broken font cache, a missing backend: whatever a drawing library raises
            logging.getLogger("qatscale").exception("figures")
            self.console.notice(f"note: the figures were not drawn ({error}); see {self.folder.logs}")
