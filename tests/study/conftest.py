from __future__ import annotations

from pathlib import Path

import pytest

from tests.study import studies


@pytest.fixture(scope="session")
def tiny(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny study that two workers have trained undisturbed. Read it, or copy it."""
    folder = tmp_path_factory.mktemp("tiny")
    file = studies.write_study(folder / "tiny.yaml", prepared)
    code, output = studies.finish(studies.study("run", file, "--out", folder / "study", "--workers", "2"))
    assert code == 0, output
    return folder / "study"
