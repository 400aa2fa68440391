"""The reference pages and the program name the same keys and options; each example on them works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from qatscale.cli.app import app
from qatscale.config.recipe import load_run_config
from qatscale.config.settings import settings
from qatscale.study.file import PLAIN_AXES, Axes, Size, Study, read_study
from qatscale.study.grid import grid

GUIDES = Path(__file__).parents[1] / "analysis" / "guides"
RECIPES, COMMANDS = GUIDES / "recipe-reference.md", GUIDES / "command-reference.md"


def rows(text: str) -> dict[str, tuple[str, str, str]]:
    """First column → (default, example, meaning) of the tables in a page."""
    cells = re.findall(r"^\| `([^`]+)` \| (.*) \| ([^|]+) \| `([^`]+)` \|$", text, re.MULTILINE)
    return {name: (default.strip("`"), example, plain(meaning)) for name, meaning, default, example in cells}


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split()).rstrip(".")


# --- recipes ---


KEYS = {
    re.sub(r"\.phases\.\w+\.", ".phases.PHASE.", key): (row.default, plain(row.meaning))
    for key, row in settings().items()
}
del KEYS["schedule.phases"]  # its parts have a row each


def test_the_page_has_the_keys_of_a_recipe() -> None:
    assert {key: (default, meaning) for key, (default, _, meaning) in rows(RECIPES.read_text()).items()} == KEYS


@pytest.mark.parametrize(
    ("key", "example"), [(key, example) for key, (_, example, _) in rows(RECIPES.read_text()).items()]
)
def test_a_key_has_an_example_that_loads(key: str, example: str) -> None:
    assert re.search(rf"(^| ){re.escape(key).replace('PHASE', '[a-z_]+')}=", example)
    assert load_run_config("debug", shlex.split(example)) != load_run_config("debug")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """The study on the page."""
    file = tmp_path / "study.yaml"
    file.write_text(*re.findall(r"^```yaml\n(.*?)^```", RECIPES.read_text(), re.DOTALL | re.MULTILINE))
    return read_study(file)


def test_the_study_on_the_page_has_every_key(study: Study) -> None:
    used = study.model_fields_set.union(*(grid.model_fields_set for grid in study.grids or ()))
    assert used == set(Study.model_fields) >= set(Axes.model_fields)
    assert set().union(*(size.model_fields_set for size in study.sizes)) == set(Size.model_fields)


@pytest.mark.parametrize("axis", PLAIN_AXES)
def test_a_plain_axis_sets_its_keys(axis: str, study: Study) -> None:
    """With its values on the page, a run each."""
    values = getattr(study, axis)
    size = Size(name="debug", recipe="debug")
    runs = grid(Study(sizes=(size,), tokens=(100_000,), bits=(2,), fractions=(0,), **{axis: values})).runs
    assert len({run.route.name for run in runs}) == len(values) > 1
    for key in PLAIN_AXES[axis].keys:
        assert [attrgetter(key)(run.config) for run in runs] == list(values)


# --- commands ---


def commands(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
    if group.callback and path:
        yield " ".join(("qatscale", *path)), group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *path, name)


PROGRAM: Any = typer.main.get_command(app)
NAMED = dict(commands(PROGRAM))
SECTIONS = {
    name: (base, rows(section))
    for name, section in re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", COMMANDS.read_text(), re.DOTALL | re.MULTILINE)
    for base in re.findall(r"^\$ (.+)$", section, re.MULTILINE)
}


def options(command: Any) -> dict[str, str | None]:
    """Name → default."""
    found = {}
    for option in command.params:
        if option.param_type_name == "option" and option.name != "help":
            shown = None if option.default is None or isinstance(option.default, bool) else str(option.default)
            found[option.opts[-1]] = "required" if option.required else shown
    return found


def parse(line: str) -> None:
    command, words = PROGRAM, shlex.split(line)[1:]
    with command.make_context("qatscale", ["--help"], resilient_parsing=True) as parent:
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        with command.make_context(command.name, words, parent=parent) as context:
            if overrides := context.params.get("overrides"):
                load_run_config("86m", overrides)


@pytest.mark.parametrize("command", ["--help", "export --help", "fit --help", "plan memory --help"])
def test_help_shows_no_value_behind_a_switch(command: str) -> None:
    shown = CliRunner().invoke(app, command.split()).output
    assert "--help" in shown
    assert "<bool>" not in shown
    assert "[default: True]" not in shown


def test_the_page_has_the_commands_and_their_options() -> None:
    assert SECTIONS.keys() == NAMED.keys()
    for name, (_, documented) in SECTIONS.items():
        expected = options(NAMED[name])
        assert documented.keys() == expected.keys(), name
        for option, default in expected.items():
            assert default in (None, documented[option][0]), f"{name} {option}"


def test_the_page_says_what_help_says() -> None:
    pages = dict(re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", COMMANDS.read_text(), re.DOTALL | re.MULTILINE))
    for name, command in NAMED.items():
        for parameter in command.params:
            words = plain(re.sub(r"\[default: .*?\]", "", getattr(parameter, "help", None) or ""))
            assert parameter.name == "help" or words in plain(pages[name]), f"{name} {parameter.name}"


def test_help_shows_the_defaults_that_it_words() -> None:
    for name, command in NAMED.items():
        shown = CliRunner().invoke(app, [*name.split()[1:], "--help"], env={"COLUMNS": "400"}).output
        for option in command.params:
            for default in re.findall(r"\[default: .+\]", getattr(option, "help", None) or ""):
                assert default in shown, f"{name} {option.name}"


@pytest.mark.parametrize("name", SECTIONS)
def test_a_command_has_examples_that_parse(name: str) -> None:
    base, documented = SECTIONS[name]
    assert base.startswith(name)
    parse(base)
    for option, (_, example, _) in documented.items():
        assert option in example.split(), option
        parse(f"{base} {example}")
