"""Start real training processes from a test: `start` is what a launcher does, without the launcher's 10 seconds.

A process is forked from one that has imported torch and DeepSpeed, which costs 5 seconds of a core and is the same in
every process. From there on it is `python COMMAND`: its own environment, folder, signals, output and exit code.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "tests.preloaded"])  # __main__: else every fork would import pytest's


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


class Python:
    """A running `python COMMAND`, with what tests use of subprocess.Popen."""

    def __init__(
        self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        """`environment`: without it, that of a shell."""
        self.command = [*map(str, command)]
        own = dict(unlaunched() if environment is None else environment)
        received, sent = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_become, args=(self.command, own, cwd or Path.cwd(), sent), daemon=True)
        self._process.start()
        sent.close()
        self.pid = self._process.pid or 0
        self._output = b""
        self._reader = threading.Thread(target=self._read, args=(received,), daemon=True)
        self._reader.start()

    def _read(self, received: Connection) -> None:
        with received:
            while part := os.read(received.fileno(), 1 << 16):
                self._output += part

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.command, timeout or 0.0, self._output)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that it has printed, errors too."""
        self.wait(timeout)
        self._reader.join(30)
        return self._output.decode(errors="replace"), None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(command: list[str], environment: dict[str, str], cwd: Path, output: Connection) -> None:
    """In the forked process: `python COMMAND`, to the end."""
    with output:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell ignores them for what it starts in the background
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    code: int | str | None = 0
    try:
        _run(*command)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.exit(code)


def _run(first: str, *rest: str) -> None:
    if first == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = [first, *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def start(command: Sequence[str | Path], ranks: int = 1, cwd: Path | None = None) -> list[Python]:
    """One process per rank with the environment that torchrun and DeepSpeed's launcher set."""
    job = os.environ | {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    return [Python(command, job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd) for rank in range(ranks)]


def finish(processes: Sequence[Python], timeout: float = 540) -> Finished:
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


def run(command: Sequence[str | Path], ranks: int = 1, cwd: Path | None = None, timeout: float = 540) -> Finished:
    return finish(start(command, ranks, cwd), timeout)
