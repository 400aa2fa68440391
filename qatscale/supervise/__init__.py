"""Watching a job: watchdog, heartbeats, failure report, signals, launcher environments."""
