"""The environment of a run: versions, machine, devices, and the commit of this code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatscale.data.selfcorpus import required_packages


def environment(hosts: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """environment.json. Names GPUs only if torch is imported already, and works without git.

    `hosts`: each host's ranks; everything else describes rank 0."""
    torch = sys.modules.get("torch")
    gpus = range(torch.cuda.device_count() if torch is not None and torch.cuda.is_available() else 0)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "hosts": {host: list(ranks) for host, ranks in (hosts or {socket.gethostname(): [0]}).items()},
        "packages": _package_versions(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count()},
        "gpus": [torch.cuda.get_device_name(index) for index in gpus] if torch is not None else [],
        "git": git_state(Path(__file__).parent),
    }


def _package_versions() -> dict[str, str | None]:
    """Installed version of qatscale and of each of its dependencies; null = not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in ["qatscale", *(required_packages() if version("qatscale") else [])]}


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_state(folder: Path) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the repository that tracks `folder`; None without one.

    `dirty` means that tracked files differ from the commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # fails for an installed copy inside another repository
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
