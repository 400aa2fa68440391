from __future__ import annotations

import pytest
from fixed_tokens import write_fixed_tokens
from trained_runs import Trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every run of trained_runs.py, trained."""
    folder = tmp_path_factory.mktemp("trained")
    made = Trained(folder, write_fixed_tokens(folder / "data"))
    made.train()
    return made
