"""`qatscale config`: keys, the values of a recipe, and the schema that editors read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qatscale.cli import main
from qatscale.config.recipe import flatten, load_run_config
from qatscale.config.schema import RunConfig
from qatscale.config.settings import explain


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["config", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def test_a_recipe_is_printed_as_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key with its value, and the output loads as a recipe."""
    for what, overrides in (("quickstart", []), ("debug", ["qat.bits=2", "tokens=20K"])):
        mine = tmp_path / "mine.yaml"
        mine.write_text(printed(capsys, what, *overrides))
        assert flatten(load_run_config(mine)) == flatten(load_run_config(what, overrides))
        assert printed(capsys, str(mine)) == mine.read_text()


def test_keys_are_printed_with_their_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = printed(capsys, "batch")
    assert all(row.key in text and row.allowed in text for row in explain("batch"))
    assert "qat.bits" not in text


def test_the_schema_describes_every_recipe_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(printed(capsys, "--json-schema"))
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert set(schema["required"]) == {"name", "tokens", "model", "data", "batch", "optimizer"}
    amounts = {choice["type"] for choice in schema["properties"]["tokens"]["anyOf"]}
    assert amounts == {"integer", "number", "string"}, "2.3B is a text"
