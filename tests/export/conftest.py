from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from export_runs import train_runs

from qatscale.cli import main


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The folder of all runs of export_runs.py, trained."""
    return train_runs(tmp_path_factory.mktemp("export"), prepared)


Qatscale = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def qatscale(capfd: pytest.CaptureFixture[str]) -> Qatscale:
    """Type a command line: (exit status, stdout, stderr). Of the descriptors, for some clients print from C."""

    def typed(line: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = 0
        try:
            main(shlex.split(line))
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, error = capfd.readouterr()
        return code, out, error

    return typed
