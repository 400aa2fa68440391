from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.bad_inputs import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that bad inputs are typed in. Copy it."""
    folder = tmp_path_factory.mktemp("world").resolve()
    make_world(folder)
    return folder
