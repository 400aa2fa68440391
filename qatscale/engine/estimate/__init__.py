"""Closed-form estimates of a run's memory, traffic and speed on a job of any size, without torch and without GPUs."""
