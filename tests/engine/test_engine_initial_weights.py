"""The same initial weights under every layout, and none where a checkpoint is loaded (initial_weights_driver.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatscale.engine.runtime import start_runtime
from tests.engine import initial_weights_driver
from tests.processes import run


def test_one_process_has_them() -> None:
    initial_weights_driver.main(start_runtime())


@pytest.mark.dist
@pytest.mark.parametrize("processes", [3, 4])
def test_all_layouts_have_them(processes: int) -> None:
    finished = run([Path(initial_weights_driver.__file__)], processes)
    assert finished.codes == [0] * processes, finished.output
    assert finished.output.count("ok") == processes
