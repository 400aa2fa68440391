from __future__ import annotations

import pytest

from tests.train.fixed_tokens import write_fixed_tokens
from tests.train.trained_runs import Trained


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """The first test that asks for `trained` waits for both launches: a minute, and more on a busy machine."""
    for item in items:
        if "trained" in item.fixturenames:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Every run of trained_runs.py, trained."""
    folder = tmp_path_factory.mktemp("trained")
    made = Trained(folder, write_fixed_tokens(folder / "data"))
    made.train()
    return made
