"""CPU, memory, disk, network and GPUs of this machine, as MLflow's own system metrics of a run."""

from __future__ import annotations

import os
import time

from qatscale.tracking.mlflow_names import Point
from qatscale.tracking.mlflow_sync import Uploader

INTERVAL = 10.0
"""Seconds between samples, where MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says nothing else: MLflow's own default."""


class SystemMetrics:
    """Samples MLflow's own monitors, but from the follower's loop: MLflow's thread ends at its first failed request."""

    def __init__(self, uploader: Uploader) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.uploader = uploader
        self.interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", INTERVAL))
        self._monitor = SystemMetricsMonitor(uploader.run_id, tracking_uri=uploader.uri)
        self._monitor.collect_metrics()  # CPU and network are differences between two looks
        self._clear()
        self._created = uploader.folder.run["created"]
        self._next = time.monotonic() + min(1.0, self.interval)

    def upload(self) -> None:
        """Upload a sample if one is due. Its step counts intervals since the run was created, so a resume goes on."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.interval
        now = time.time()
        step = int((now - self._created) / self.interval)
        self._monitor.collect_metrics()
        sample = self._monitor.aggregate_metrics()
        self._clear()
        self.uploader.log([Point(f"system/{key}", value, int(now * 1000), step) for key, value in sample.items()])

    def _clear(self) -> None:
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
