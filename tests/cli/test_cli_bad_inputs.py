"""Every bad input through the real entry: exit status 2, one message that helps, nothing started; and their table.

After a message was changed on purpose: `python -m pytest tests/cli/test_cli_bad_inputs.py --regenerate`
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from bad_inputs import CASES, WORLD, Case, run_command

from qatscale.errors import EXIT_BAD_INPUT

TESTS = Path(__file__).parents[1]
TABLE = TESTS / "bad_inputs.md"
sys.path.insert(0, str(TESTS / "config"))

from test_config_ds_config import BAD_DS_CONFIGS, ZERO1  # noqa: E402
from test_config_errors import BAD_FILES, BAD_OVERRIDES  # noqa: E402

Answer = Callable[[Case], tuple[int, str, str]]
ALL = [case for cases in CASES.values() for case in cases]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.typed)
def test_a_bad_input_gets_one_message_that_helps(case: Case, answer: Answer, world: Path) -> None:
    shutil.rmtree(world / "out", ignore_errors=True)
    code, out, error = answer(case)
    assert code == EXIT_BAD_INPUT
    assert "Traceback" not in out + error
    assert error.startswith("error: ")
    first, *rest = error.splitlines()
    assert not rest or (first == f"error: {len(rest)} problems:" and all(line.startswith("  ") for line in rest))
    assert [part for part in case.tells if part not in error] == [], error
    assert not (world / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("trian debug", "Did you mean 'train'?"),
        ("prepare corpus.jsonl", "Missing option '--out'"),
        ("evaluate runs/trunk --bits 4", "No such option: --bits"),
        ("plan memory 500MB --bits 4", "Missing option '--tokens'"),
    ],
)
def test_a_wrong_command_line_names_what_is_wrong(typed: str, told: str) -> None:
    code, out, error = run_command(shlex.split(typed))
    assert (code, out) == (EXIT_BAD_INPUT, "")
    assert told in " ".join(error.replace("│", " ").split())


def test_other_processes_of_a_job_speak_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the first one has told it and the launcher has ended them, unless only they have met it."""
    waited: list[float] = []
    monkeypatch.setattr("qatscale.cli.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    code, out, error = run_command(["train", "debgu"])
    assert (code, out) == (EXIT_BAD_INPUT, "")
    assert error.startswith("error: recipe = 'debgu'")
    assert error.endswith("(process 1)\n")
    assert waited == [5.0]


def test_the_table_is_what_is_printed_now(answer: Answer, world: Path, pytestconfig: pytest.Config) -> None:
    shutil.rmtree(world / "out", ignore_errors=True)
    table = render(lambda case: answer(case)[2])
    if pytestconfig.getoption("--regenerate", default=False):
        TABLE.write_text(table)
    assert TABLE.read_text() == table, "if the change is meant: pytest tests/cli/test_cli_bad_inputs.py --regenerate"


def render(printed: Callable[[Case], str]) -> str:
    """The table as Markdown. What the configuration's own tests know as bad is typed here, in the working folder."""
    parts = [
        "# Bad inputs, and what each prints\n",
        "Generated from the tests, which type every line of it; after a message was changed on purpose, run\n"
        "`python -m pytest tests/cli/test_cli_bad_inputs.py --regenerate`.\n",
        "Each exits with status 2 before anything is trained or written, but for the folder of an unfinished\n"
        "`prepare`. The working folder holds:\n",
        "\n".join(f"- {_code(*names)}: {content}" for names, content in WORLD.items()) + "\n",
    ]
    for title, cases in CASES.items():
        rows = [(case.what, _code(f"qatscale {case.typed}"), _plain(printed(case))) for case in cases]
        parts.append(_section(title, ("what is wrong", "typed", "printed"), rows))
    keys = [(_code(shlex.join(typed)), _plain(_of_command("train", "debug", *typed))) for typed in BAD_OVERRIDES]
    parts.append(_section("Keys of a recipe: `qatscale train debug …`", ("typed", "printed"), keys))
    recipes = [
        (_code(*text.splitlines() or [" "]), _plain(_of_file("mine.yaml", text, "train", "mine.yaml")))
        for text in BAD_FILES
    ]
    parts.append(_section("Recipe files: `qatscale train mine.yaml`", ("line by line", "printed"), recipes))
    ds_configs = []
    for added, _ in BAD_DS_CONFIGS.values():
        text = json.dumps(ZERO1 | added)
        ds_configs.append(
            (_code(text), _plain(_of_file("mine.json", text, "train", "debug", "engine.ds_config=mine.json")))
        )
    parts.append(
        _section("ds_configs: `qatscale train debug engine.ds_config=mine.json`", ("mine.json", "printed"), ds_configs)
    )
    return "\n".join(parts)


def _of_command(*words: str) -> str:
    code, _, error = run_command(list(words))
    assert code == EXIT_BAD_INPUT
    return error


def _of_file(name: str, text: str, *words: str) -> str:
    Path(name).write_text(text)
    try:
        return _of_command(*words)
    finally:
        Path(name).unlink()


def _section(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([f"## {title}\n", *(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"


def _code(*texts: str) -> str:
    return ", ".join(f"`{text}`" for text in texts).replace("|", "\\|")


def _plain(text: str) -> str:
    """As Markdown that shows `text` itself, within a table's cell."""
    return re.sub(r"([|*]|<(?=\w))", r"\\\1", text.strip()).replace("\n", "<br>")
