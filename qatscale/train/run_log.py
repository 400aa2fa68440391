"""Everything that a run reports: its folder, the console, a log file of each process."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qatscale.engine.checkpoints.manifest import Manifest
from qatscale.engine.runtime import Runtime
from qatscale.engine.spikes import Spike
from qatscale.quant.report import SwitchReport
from qatscale.supervise.failure_report import Failure
from qatscale.supervise.watchdog import Watchdog
from qatscale.tracking.run_folder import RunFolder, perplexity
from qatscale.train.components import RunSetup
from qatscale.train.console import RunConsole
from qatscale.train.metrics import SLOW, SLOW_INTERVALS

SCALES_FLOORED_WARNING = 0.01
"""Share of scales at their floor above which a run warns."""


class RunLog:
    """Records the events of a run: rank 0 in the run folder and on the console, each process in its log file."""

    def __init__(self, setup: RunSetup, runtime: Runtime, *, linger: bool = True) -> None:
        self.setup, self.config, self.timeline, self.resume = setup, setup.config, setup.timeline, setup.resume
        self.runtime, self.linger = runtime, linger
        self.n_params = setup.weights.params
        self.folder = RunFolder(self.config.folder)
        self.console = RunConsole(runtime.rank, self.timeline.steps, self.resume.step)
        self.hosts: dict[str, list[int]] = {}
        """Each host's ranks, once the processes have met."""
        self.step = self.resume.step
        """Steps done, as far as reported: where a failure or a stop is placed."""
        self._is_open = self._warned = False

    @contextmanager
    def recording(self, watchdog: Watchdog) -> Iterator[None]:
        """A context around the steps. The watchdog resolves an error inside and has it recorded by `failed`."""
        try:
            with self.console, self._log_file():
                self._is_open = True
                try:
                    yield
                except BaseException as error:
                    watchdog.resolve_failure(error)
                    error.add_note(f"log: {self.folder.logs / f'rank-{self.runtime.rank}.log'}")
                    raise
        finally:
            self._is_open = False
            self.folder.close()

    @contextmanager
    def _log_file(self) -> Iterator[None]:
        """Lines such as `2026-11-22T08:30:00.123Z host rank 3 WARNING qatscale: …`, which sort across hosts."""
        rank, host = self.runtime.rank, socket.gethostname()
        self.folder.logs.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.folder.logs / f"rank-{rank}.log", encoding="utf-8")
        line = f"%(asctime)s.%(msecs)03dZ {host} rank {rank} %(levelname)s %(name)s: %(message)s"
        handler.setFormatter(formatter := logging.Formatter(line, datefmt="%Y-%m-%dT%H:%M:%S"))
        formatter.converter = time.gmtime
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()

    # --- one verb per event; on ranks other than 0 only `failed` does anything ---

    def failed(self, first: Failure, own: Failure) -> None:
        """The job has failed. May be called by another thread, while this one hangs in a collective."""
        if not self._is_open:
            return
        logging.getLogger("qatscale").error(f"{own.text}\n{first.sentence}")
        if self.runtime.is_main:
            step = max(first.step, self.step)
            self.folder.append("failed", step=step, error=first.error, rank=first.rank, host=first.host)

    def notice(self, text: str) -> None:
        self.console.notice(text)

    def step_done(self, step: int, compiled: str | None) -> None:
        """compiled: what was compiled in this step, for a person."""
        self.console.advance(step)
        if compiled:
            self.console.notice(f"step {step}: {compiled}")

    def metrics(self, step: int, record: dict[str, Any]) -> None:
        self.step = step
        if self.runtime.is_main:
            self.console.metrics(self.folder.append("metrics", step=step, **record))
            floored = record.get("scales_floored", 0)
            if floored > SCALES_FLOORED_WARNING and not self._warned:
                self._warned = True
                self.console.notice(
                    f"warning: {floored:.1%} of the quantizer scales lie at their floor, where a row's weights are all "
                    "clipped and do not train. Lower qat.scale_lr_ratio and branch from before the switch."
                )

    def straggler(self, step: int, rank: int, record: Mapping[str, Any]) -> None:
        if self.runtime.is_main:
            host = next((host for host, ranks in self.hosts.items() if rank in ranks), "an unknown host")
            ratio = record["slowest_seconds"] / max(record["median_seconds"], 1e-9)
            self.console.notice(
                f"step {step}: warning: rank {rank} on {host} takes {ratio:.2g} times the median for what it computes "
                f"by itself, the {SLOW_INTERVALS}th interval in a row above {SLOW:g} times; the others wait for it"
            )

    def spike(self, step: int, spike: Spike, action: str) -> None:
        if self.runtime.is_main:
            self.folder.append("spike", step=step, norm=spike.norm, mean=spike.mean, action=action)
            self.console.notice(f"step {step}: {spike}; its update was not applied")

    def rolled_back(self, step: int) -> None:
        """The run continues from the checkpoint of `step`."""
        self.step = step
        if self.runtime.is_main:
            self.folder.append("resume", step=step)
            self.console.notice(f"rolled back to the checkpoint of step {step}")

    def switched(self, report: SwitchReport) -> None:
        if self.runtime.is_main:
            weights = self.setup.weights
            stored = {"effective_bits": weights.effective_bits, "bytes": weights.bytes, "shares": weights.shares}
            self.folder.append("switch", step=report.step, report=report.to_dict() | {"model": stored})
            self.console.show(report.table())
            self.console.notice(f"{weights.params:,} parameters: {weights.text(self.config.qat.bits)}")

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """losses: view -> mean loss in nats."""
        if self.runtime.is_main:
            for view, loss in losses.items():
                record = {"tokens": step * self.config.tokens_per_step, "view": view, "loss": loss}
                self.console.validation(
                    self.folder.append("validation", step=step, **record, perplexity=perplexity(loss))
                )

    def checkpoint(self, saved: Manifest, path: Path) -> None:
        if self.runtime.is_main:
            self.folder.append("checkpoint", step=saved.step, path=str(path), reason=saved.reason, kept=saved.kept)
            self.console.notice(f"step {saved.step}: checkpoint {path}")

    def stopped(self, step: int, number: int) -> None:
        if self.runtime.is_main:
            name = signal.Signals(number).name
            self.folder.append("stopped", step=step, signal=name)
            where = f"saved at step {step}; the same command continues from there"
            self.console.notice(f"{name}: {where if step else 'stopped before the first step'}")
