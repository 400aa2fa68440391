"""Fixtures of the tracking tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.store import quiet_mlflow
from tests.tracking.synthetic_runs import MakeRun, make_run_in


@pytest.fixture(autouse=True)
def _own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default store lies in the working folder; here it is one of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run_in` the folder runs/ of this test."""

    def make(name: str = "run", **settings: object) -> RunFolder:
        return make_run_in(tmp_path / "runs", name, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database. MLflow takes seconds to make one, and a copy none."""
    file = tmp_path_factory.mktemp("template") / "mlflow.db"
    with quiet_mlflow():
        from mlflow.tracking import MlflowClient

        MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def sqlite(template: Path, tmp_path: Path) -> str:
    """The URI of an empty store of this test, in the folder store/."""
    (tmp_path / "store").mkdir()
    shutil.copy(template, tmp_path / "store" / "mlflow.db")
    return f"sqlite:///{tmp_path}/store/mlflow.db"
