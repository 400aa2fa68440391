"""Which store a run goes to, where its artifacts lie, and the command that shows it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from qatscale.errors import fault
from qatscale.files import HeldError, locked
from qatscale.tracking.refusals import RefusedError, check_database
from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.store import (
    Cursor,
    artifact_location,
    known_store,
    quiet_mlflow,
    resolve_uri,
    ui_command,
    where_to_look,
)
from tests.tracking.synthetic_runs import MakeRun


def test_the_default_is_sqlite_in_the_working_folder(tmp_path: Path) -> None:
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_recipe_goes_before_the_environment_and_that_before_the_store_that_has_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert resolve_uri(None, known="http://known:1") == "http://known:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:1")
    assert resolve_uri(None, known="http://known:1") == "http://environment:1"
    assert resolve_uri("http://recipe:1") == "http://recipe:1"
    assert resolve_uri("none") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "None")
    assert resolve_uri(None) is None
    assert resolve_uri("sqlite:///x/y.db") == f"sqlite:///{tmp_path}/x/y.db"


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("mlruns", "{here}/mlruns"),
        ("https://host/path", "https://host/path"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
        ("databricks", "databricks"),
    ],
)
def test_relative_places_become_absolute_and_addresses_stay(uri: str, resolved: str, tmp_path: Path) -> None:
    assert resolve_uri(uri) == resolved.format(here=tmp_path)


def test_a_branch_belongs_to_its_parents_store_wherever_it_is_begun(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = make_run("trunk")
    Cursor.fresh(trunk, f"sqlite:///{tmp_path}/mlflow.db").save(trunk)
    branch = make_run("branch", parent=(trunk, 50))
    monkeypatch.chdir("/")
    assert resolve_uri(None, known=known_store(branch)) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_store_that_moved_with_its_runs_is_found(make_run: MakeRun, tmp_path: Path) -> None:
    """And a store that is only named by a run stays what it is."""
    folder = make_run("run")
    (tmp_path / "mlflow.db").touch()
    cursor = Cursor.fresh(folder, f"sqlite:///{tmp_path}/mlflow.db")
    cursor.model_copy(update={"experiment_id": "1"}).save(folder)
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    moved_run = RunFolder(moved / "runs" / "run")
    assert known_store(moved_run) == f"sqlite:///{moved}/mlflow.db"
    assert f"sqlite:///{moved}/mlflow.db" in where_to_look([moved_run])[0]
    (moved / "mlflow.db").unlink()
    assert known_store(moved_run) == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_path_that_mlflow_would_read_as_another_is_refused(name: str, tmp_path: Path) -> None:
    check_database(f"sqlite:///{tmp_path}/50% é #1=/mlflow.db")
    with pytest.raises(RefusedError, match="MLflow would use another file"):
        check_database(f"sqlite:///{tmp_path}/{name}/mlflow.db")


def test_credentials_come_from_the_environment_where_the_run_recorded_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert resolve_uri("http://host:5000") == "http://me:secret@host:5000"
    assert resolve_uri("http://other:5000") == "http://other:5000"


def test_a_page_is_named_for_each_store_once(make_run: MakeRun, tmp_path: Path) -> None:
    first, second, third = (make_run(name) for name in ("first", "second", "third"))
    for folder, uri in ((first, f"sqlite:///{tmp_path}/x.db"), (second, f"sqlite:///{tmp_path}/x.db")):
        cursor = Cursor.fresh(folder, uri)
        cursor.experiment_id = "7"
        cursor.save(folder)
    third.tracking_file.write_text("{damaged")
    (line,) = where_to_look([first, second, third])
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/x.db" in line
    assert "http://127.0.0.1:5000/#/experiments/7/runs?" in line


def test_artifacts_lie_beside_a_sqlite_file_and_a_server_decides_for_itself() -> None:
    assert artifact_location("sqlite:////a b/mlflow.db", "my runs") == "file:///a%20b/mlartifacts/my%20runs"
    assert artifact_location("http://host", "x") is None


def test_the_ui_command_names_a_program_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, *rest = shlex.split(ui_command("sqlite:////a b/mlflow.db"))
    assert shutil.which(program) is not None
    assert rest == ["ui", "--backend-store-uri", "sqlite:////a b/mlflow.db"]
    beside = Path(sys.executable).with_name("mlflow")
    monkeypatch.setenv("PATH", str(beside.parent))
    assert shlex.split(ui_command("sqlite:////x.db"))[0] == "mlflow"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(ui_command("sqlite:////x.db"))[0] == str(beside)
    monkeypatch.chdir(beside.parent.parent)
    assert shlex.split(ui_command("sqlite:////x.db"))[0] == f"{beside.parent.name}/mlflow"
    assert ui_command("http://host:5000") == "http://host:5000"


def test_quiet_keeps_what_the_user_set_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_LOGGING_LEVEL", raising=False)
    with quiet_mlflow(timeout=5):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert "MLFLOW_LOGGING_LEVEL" not in os.environ


def test_a_lock_is_waited_for_and_not_forced(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lock"
    with locked(file):
        with pytest.raises(HeldError, match="another process holds the lock"), locked(file, wait=0.2):
            pytest.fail("it is held")
        with pytest.raises(HeldError) as error, locked(file, give_up=lambda: True):
            pytest.fail("it is held")
    assert fault(error.value) == f"another process holds the lock on {file}"
    file.unlink()
    os.mkfifo(file)
    with locked(file, wait=0):
        pass
