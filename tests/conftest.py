"""What tests of several rooms share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes on two cores; before torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))  # tests/processes.py

import pytest


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder made of the embedded corpus, with 512 pieces: what recipe `debug` trains on."""
    from qatscale.data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(["self:600K"], folder, vocab_size=512, validation_fraction=0.05, workers=1)
    return folder
