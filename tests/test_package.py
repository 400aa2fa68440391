"""The wheel holds every package and every file that the code reads; the sdist also what a clone is tested with."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"qatscale": ROOT / "qatscale", "qatlaw": ROOT / "analysis" / "qatlaw"}


def package_of(file: Path) -> str:
    name, home = next((name, home) for name, home in FOLDERS.items() if file.is_relative_to(home))
    return ".".join((name, *file.parent.relative_to(home).parts))


def test_every_package_and_data_file_is_declared() -> None:
    files = [file for home in FOLDERS.values() for file in home.rglob("*") if file.is_file()]
    files = [file for file in files if "__pycache__" not in file.parts and file.name != "README.md"]
    assert {package_of(file) for file in files if file.suffix == ".py"} <= set(TOOL["packages"])
    data = TOOL["package-data"]
    for file in files:
        if file.suffix != ".py":
            owners = [name for name in data if package_of(file) == name or package_of(file).startswith(f"{name}.")]
            homes = {name: FOLDERS[name.split(".")[0]].joinpath(*name.split(".")[1:]) for name in owners}
            assert any(file in home.glob(pattern) for name, home in homes.items() for pattern in data[name]), file


def test_type_checkers_read_the_annotations() -> None:
    assert all((home / "py.typed").is_file() for home in FOLDERS.values())


def test_the_sdist_has_what_a_clone_is_started_and_tested_with() -> None:
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    grafted = {word for line in lines for word in line.split()[1:] if line.startswith("graft")}
    assert {"launch", "tests", "analysis"} <= grafted
    included = {word for line in lines for word in line.split()[1:] if line.startswith("include")}
    assert {"requirements.lock", "requirements-dev.lock"} <= included
