"""Start real training processes from a test: `start` is what a launcher does, without the launcher's 10 seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Finished:
    codes: list[int]
    output: str
    """Of all ranks, one after the other."""


GRACE = 15.0
"""Launchers give the others 30 seconds."""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def unlaunched() -> dict[str, str]:
    """This environment as a shell has it: a test that trains in this process leaves what torch asks for in it."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHED}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: Sequence[str | Path], ranks: int = 1, cwd: Path | None = None) -> list[subprocess.Popen[str]]:
    """One process per rank with the environment that torchrun and DeepSpeed's launcher set."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment,
                cwd=cwd,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[str]], timeout: float = 240) -> Finished:
    """Wait for all; when one fails, the others are killed after GRACE seconds, as a launcher would."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout)[0])
            if process.returncode != 0:
                ends = time.monotonic() + GRACE
                while time.monotonic() < ends and any(other.poll() is None for other in processes):
                    time.sleep(0.1)
                for other in processes:
                    other.kill()
    finally:
        for process in processes:
            process.kill()
    return Finished([process.wait() for process in processes], "\n".join(outputs))


def run(command: Sequence[str | Path], ranks: int = 1, cwd: Path | None = None, timeout: float = 240) -> Finished:
    return finish(start(command, ranks, cwd), timeout)
