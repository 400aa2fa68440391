"""What the README tells people to type works, and what it points at is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from qatscale.cli.app import app
from qatscale.config.recipe import load_run_config, recipe_names
from qatscale.schedule.build import build_timeline

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md"]


def shell_lines() -> list[str]:
    """Commands in ```sh blocks, continuation lines joined."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            lines += [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def mentioned_paths() -> set[str]:
    """`path/like/this` in backticks and link targets, of files that belong to the repository."""
    rooms = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = set()
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        found |= set(re.findall(rf"`((?:\./)?(?:{rooms})/[\w./-]*)`", text))
        found |= {m for m in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in m}
    return found


def test_readme_has_commands_and_paths() -> None:
    assert len([line for line in shell_lines() if "qatscale" in line]) >= 8
    assert len(mentioned_paths()) >= 10


@pytest.mark.parametrize("path", sorted(mentioned_paths()))
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "launch" / path).exists(), f"README mentions {path}"


@pytest.mark.parametrize("line", shell_lines())
def test_command_parses(line: str) -> None:
    """The command exists, takes these options, and its overrides make a recipe whose timeline can be built."""
    words = shlex.split(line)
    words = [word for word in words if not re.match(r"^[A-Z_]+=", word)]  # an environment variable in front
    if words[0] in ("source", "git", "cd", "pip", "mlflow"):
        return
    if words[0].startswith("./"):
        assert (ROOT / words[0]).exists(), line
        return
    if words[0] == "python":
        assert (ROOT / words[1]).exists(), line
        return
    if words[0] in ("deepspeed", "torchrun"):
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).exists(), line
        words = ["qatscale", "train", *words[script + 1 :]]
    assert words[0] == "qatscale", f"not a command that the README may show: {line}"
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    with command.make_context("qatscale", ["--help"], resilient_parsing=True) as parent:
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(command.name, rest, parent=parent)
    overrides = [word for word in words[2:] if re.match(r"^[a-z_][a-z_.0-9]*=", word)]
    recipe = next((word for word in words[2:] if word in recipe_names()), "86m")  # a branch: of the README's trunk
    build_timeline(load_run_config(recipe, overrides))


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("[a-z]*/**/*.md")), ids=str)
def test_a_page_says_things_once_and_its_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (page.parent / link).exists(), link
    if page.parent.name != "benchmarks" and page.name != "CHANGELOG.md":  # records keep the names of their day
        folders = "analysis|ds_configs|launch|qatscale|tests"
        for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\.\w+", page.read_text()):
            assert (ROOT / path).exists(), path
