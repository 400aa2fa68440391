"""Fixtures of the tracking tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import MakeRun, make_run_in

from qatscale.tracking.run_folder import RunFolder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run_in` the folder runs/ of this test."""

    def make(name: str = "run", **settings: object) -> RunFolder:
        return make_run_in(tmp_path / "runs", name, **settings)  # type: ignore[arg-type]

    return make
