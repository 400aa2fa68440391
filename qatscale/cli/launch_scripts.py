"""`qatscale launch-scripts`: the scripts that start jobs on many hosts, for users without a clone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qatscale.new_folder import appearing, check_new

_FOLDERS = (Path(__file__).parents[2] / "launch", Path(__file__).with_name("launch"))
"""Beside the package in a clone, inside it in a wheel."""
_FOR_CLONES = ("quickstart.sh", "environment.sh")


def launch_scripts(
    folder: Annotated[Path, typer.Argument(help="The new folder. Jobs run in its parent folder.")],
) -> None:
    """Write the scripts that start a job on several hosts: pdsh, no ssh, OpenMPI, MPICH, Slurm.

    Edit hosts and network interface at the top of each. README.md says which variables reach the other hosts.
    """
    source = next(place for place in _FOLDERS if place.is_dir())
    files = [file for file in sorted(source.iterdir()) if file.is_file() and file.name not in _FOR_CLONES]
    check_new(folder, "folder")
    with appearing(folder, "folder") as made:
        for file in files:
            text = file.read_text(encoding="utf-8").replace("${VENV:-.venv}", f"${{VENV:-{sys.prefix}}}")
            copy = made / file.name
            copy.write_text(text.replace("launch/", f"{folder.name}/"), encoding="utf-8")
            copy.chmod(0o755 if file.suffix == ".sh" else 0o644)
    print(f"{folder}: {', '.join(file.name for file in files)}")
