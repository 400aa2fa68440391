"""The list of formats is the only one: options, refusals, documentation, recognition and tests follow it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qatscale.cli.app import app
from qatscale.errors import UserError
from qatscale.export.formats import FORMATS
from qatscale.export.formats.base import Exported, find_export, get_format
from tests.export.expected import EXPECTED

GUIDE = Path(__file__).parents[2] / "analysis/guides/ship-it.md"


def test_every_format_is_tested_and_every_tested_one_exists() -> None:
    assert set(FORMATS) == set(EXPECTED)


def test_every_format_is_documented() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", GUIDE.read_text(), re.MULTILINE) == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_offered_and_refused_by_its_name(name: str) -> None:
    assert get_format(name).name == name
    help = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).stdout
    assert f"{name}: " in help
    with pytest.raises(UserError, match=name):
        get_format("nothing like it")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_by_its_files(tmp_path: Path, name: str) -> None:
    for file, content in EXPECTED[name].files.items():
        (tmp_path / file).write_text(json.dumps(content))
    format = get_format(name)
    assert find_export(tmp_path) == Exported(format, format.path(tmp_path))


def test_a_gguf_file_is_an_export_and_two_in_a_folder_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert (
        find_export(tmp_path) == find_export(tmp_path / "a.gguf") == Exported(get_format("gguf"), tmp_path / "a.gguf")
    )
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"a\.gguf, b\.gguf"):
        find_export(tmp_path)


def test_a_run_is_not_an_export(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    assert find_export(tmp_path) is None
