"""What a run remembers of where things are: absolute, found again after a move, without credentials."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qatscale.config.places import absolute_uri, without_credentials
from qatscale.config.recipe import load_run_config, recorded_yaml, resolved_yaml


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("https://secret@host/x", "https://host/x"),
        ("postgresql://me:s@c/ret@host/db", "postgresql://host/db"),
        ("http://me@corp.com:secret@host/x", "http://host/x"),
        ("http://me@corp.com:s/cret@host:5000/x", "http://host:5000/x"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dsecret", "mssql+pyodbc:///?odbc_connect="),
        ("http://host:5000?at=a@b", "http://host:5000?at=a@b"),
        ("postgresql://host/db?user=me&password=secret&sslmode=on", "postgresql://host/db?user=&password=&sslmode=on"),
        ("tracking.uri=http://me:secret@host", "tracking.uri=http://host"),
        ("sqlite:////a b/c@d.db", "sqlite:////a b/c@d.db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("name=x@y", "name=x@y"),
    ],
)
def test_an_address_without_its_credentials(text: str, kept: str) -> None:
    assert without_credentials(text) == kept
    assert without_credentials(kept) == kept


def test_no_recipe_holds_a_password_and_a_run_still_uses_it() -> None:
    config = load_run_config("debug", ["tracking.uri=http://me:secret@host:5000"])
    assert config.tracking.uri == "http://me:secret@host:5000"
    assert "secret" not in resolved_yaml(config) + recorded_yaml(config)
    assert "uri: http://host:5000" in recorded_yaml(config)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder beside its data and its ds_config, begun in their common folder by relative paths."""
    work = tmp_path / "before"
    (work / "data").mkdir(parents=True)
    (work / "mine.json").write_text("{}")
    monkeypatch.chdir(work)
    config = load_run_config("debug", ["name=run", "data.path=data", "engine.ds_config=mine.json", "output=runs"])
    folder = work / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "recipe.yaml").write_text(recorded_yaml(config))
    return folder


def test_a_run_is_read_from_any_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_run_config(run / "recipe.yaml")
    assert (config.data.path, config.output) == (tmp_path / "before" / "data", run.parent)
    assert config.engine.ds_config == str(tmp_path / "before" / "mine.json")
    assert absolute_uri("sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"


@pytest.mark.parametrize("former", [False, True])
def test_data_that_moved_with_their_run_are_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: bool
) -> None:
    """Former versions kept relative paths."""
    if former:
        recipe = run / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(f"{tmp_path}/before/", ""))
    monkeypatch.chdir("/")
    shutil.move(tmp_path / "before", tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "runs" / "run"
    config = load_run_config(moved / "recipe.yaml")
    assert config.data.path == tmp_path / "elsewhere" / "data"
    assert config.engine.ds_config == str(tmp_path / "elsewhere" / "mine.json")
    shutil.move(tmp_path / "elsewhere" / "data", tmp_path / "data")
    config = load_run_config(moved / "recipe.yaml", ["data.path=/given"])
    assert config.data.path == Path("/given"), "an override is taken as it is"
