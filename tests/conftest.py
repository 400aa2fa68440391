"""What tests of several packages share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes on two cores; before torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).parents[1]
# Processes that a test starts import its helpers as the package `tests`, too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
# Examples of property tests are not timed one by one: on a busy machine a single one can take seconds.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder made of the embedded corpus, with 512 pieces: what recipe `debug` trains on."""
    from qatscale.data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(["self:600K"], folder, vocab_size=512, validation_fraction=0.05, workers=1)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The guides first: the longest file would keep one of two workers busy alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_guides.py")
