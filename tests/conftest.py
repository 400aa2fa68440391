"""What tests of several packages share."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes on two cores; before torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Tests send these to what they start. A suite that nohup or a script runs in the background would pass on that they are
# ignored.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
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
    """The longest first, lest one of two workers is busy alone at the end: the guides, then files whose tests start
    processes."""
    several = {item.path for item in items if item.get_closest_marker("dist")}
    items.sort(key=lambda item: (item.path.name != "test_guides.py", item.path not in several))


class Together(LoadScopeScheduling):
    """A file stays on one worker; so do files whose tests share what takes half a minute to make."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid.partition("::")[0])


@cache
def _group(file: str) -> str:
    path = ROOT / file
    return path.parent.name if path.parent.name == "export" or "trained: Trained" in path.read_text() else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config) -> Together:
    return Together(config)
