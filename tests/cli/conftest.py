"""The folder that bad inputs are typed in, made once a session, and the option that rewrites their table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bad_inputs import Case, make_world, run_command


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="Rewrite tests/bad_inputs.md from what is printed now.")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world").resolve()
    make_world(folder)
    return folder


@pytest.fixture(scope="session")
def answers() -> dict[Case, tuple[int, str, str]]:
    """What was typed already in this session."""
    return {}


@pytest.fixture
def answer(
    world: Path, answers: dict[Case, tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case], tuple[int, str, str]]:
    """(exit status, stdout, stderr) of a case; the world's own path taken out of the messages."""
    monkeypatch.chdir(world)

    def ask(case: Case) -> tuple[int, str, str]:
        if case not in answers:
            before = _paths(world)
            code, out, error = run_command(case.words)
            assert _paths(world) == before, "a bad input left something behind"
            answers[case] = code, out, error.replace(f"{world}/", "")
        return answers[case]

    return ask


def _paths(world: Path) -> set[Path]:
    """Everything but what an unfinished `prepare` leaves in its own folder, to go on from."""
    return {path for path in world.rglob("*") if path.relative_to(world).parts[0] != "out"}
