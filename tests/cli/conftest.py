from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.bad_inputs import make_world
from tests.processes import LAUNCHED


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that bad inputs are typed in. Copy it."""
    folder = tmp_path_factory.mktemp("world").resolve()
    make_world(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training in this process leaves a launcher's variables behind, by which a later dry run would count."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
