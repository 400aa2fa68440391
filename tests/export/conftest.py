from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from qatscale.cli import main
from tests.export.export_runs import train_runs
from tests.export.exported import need


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The folder of all runs of export_runs.py, trained."""
    return train_runs(tmp_path_factory.mktemp("export"), prepared)


@pytest.fixture(scope="session")
def exports(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(run, format) -> the export, made once. It is not to be changed."""
    folder = tmp_path_factory.mktemp("exports")

    def export(run: str, format: str) -> Path:
        need(format)
        out = folder / f"{run}-{format}"
        if not out.exists():
            with pytest.raises(SystemExit) as stop:
                main(["export", str(runs / run), "--format", format, "--out", str(out), "--fallback"])
            assert not stop.value.code
        return out

    return export


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
