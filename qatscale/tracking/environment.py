"""What a run ran on: versions, machine, devices, and the commit of this code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def environment(hosts: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """environment.json. Asks torch only if it is imported already, and never fails for want of git.

    `hosts`: each host's ranks; all else is of rank 0's."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "hosts": {host: list(ranks) for host, ranks in (hosts or {socket.gethostname(): [0]}).items()},
        "packages": package_versions(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count()},
        "gpus": gpus(),
        "git": git_state(Path(__file__).parent),
    }


def package_versions(package: str = "qatscale") -> dict[str, str | None]:
    """Installed version of `package` and of each of its declared dependencies; null = not installed."""
    try:
        requirements = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    # a requirement starts with the name; those behind `extra ==` belong to developers
    names = [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]  # type: ignore[index]
    versions: dict[str, str | None] = {}
    for name in [package, *sorted(names)]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpus() -> list[str]:
    """Names of the GPUs this process sees; empty where torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def git_state(folder: Path) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the repository that tracks `folder`; None where none does.

    `dirty` means that tracked files differ from the commit.
    """
    # an installed copy inside somebody else's repository is not that repository's code
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "dirty": bool(changes and changes.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
