"""The folders of a run's checkpoints, by name, for code that does not read their contents."""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST = "manifest.json"
STEP = re.compile(r"^step-(\d{8,})$")
"""The name of a checkpoint's folder."""


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints that may be read, oldest first. Half-written ones are hidden by their name."""
    return [folder for folder in step_folders(checkpoints) if os.path.isfile(folder / MANIFEST)]  # noqa: PTH113


def step_folders(checkpoints: Path) -> list[Path]:
    """Complete checkpoints and half-deleted ones, oldest first."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted((path for path in found if STEP.match(path.name)), key=step_of)
