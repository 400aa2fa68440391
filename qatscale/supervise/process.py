"""The identity of a process, and whether it and its launcher still run.

A process id alone does not identify a process: ids are used again, and a folder may lie on a disk that several machines
share. Host, boot id and start tick together identify it for good. Linux `proc(5)`: field 22 of `/proc/PID/stat` is the
start time in clock ticks since boot, which no change of the wall clock can touch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_ZOMBIE_OR_DEAD = {"Z", "X", "x"}
_ON_A_HOST = "deepspeed.launcher.launch"
_LAUNCHERS = {"deepspeed", "torchrun", "torch.distributed.run", _ON_A_HOST}


def identity() -> dict[str, Any]:
    """This process: ``{"host", "pid", "boot_id", "namespace", "start_ticks"}``; null without /proc."""
    stat = _stat(os.getpid())
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot_id": _boot_id(),
        "namespace": _namespace(),
        "start_ticks": stat[1] if stat else None,
    }


def is_alive(process: Mapping[str, Any], wrote: float = 0.0) -> bool | None:
    """Whether the process of `identity()` still runs; None where it cannot be known here, since the process belongs to
    another machine or to another container of this one.

    wrote: when it last gave a sign of life. After this machine started, a process of another boot was of another
    machine of the same name. A zombie (ended, not yet collected by its parent) counts as dead.
    """
    if process["host"] != socket.gethostname() or process.get("namespace") not in (None, _namespace()):
        return None
    if process["boot_id"] is None:
        return psutil.pid_exists(process["pid"])
    if process["boot_id"] != _boot_id():
        return None if wrote > psutil.boot_time() else False
    stat = _stat(process["pid"])
    return stat is not None and stat[0] not in _ZOMBIE_OR_DEAD and stat[1] == process["start_ticks"]


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start tick) of a process; None where it does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # field 2 is the command in parentheses and may itself hold spaces and parentheses
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    """The process namespace: containers of one host may share its name and boot id, but not process ids."""
    try:
        return Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return None


# --- whether the launcher still runs ---


class LauncherProcesses:
    """The processes of DeepSpeed's or torch's launcher that this one descends from.

    SIGTERM to the single-node `deepspeed` command ends that command and nothing else: its launcher and the training
    processes stay, without a parent. The same happens on a remote host whose ssh connection ends.
    """

    def __init__(self, first: int | None = None) -> None:
        self._chain: list[tuple[int, int]] = []
        """(process, its parent), upwards as far as launchers made them."""
        process = os.getpid() if first is None else first
        while (parent := _parent_of(process)) and parent > 1 and (_is_launcher(parent) or _is_on_host(process)):
            self._chain.append((process, parent))
            process = parent

    def gone(self) -> bool:
        """Whether one of them has ended: its child has another parent now."""
        return any(_parent_of(process) != parent for process, parent in self._chain)


launched_by = functools.cache(LauncherProcesses)
"""Those of the first call: the command's, since a launcher may end while this process still starts."""


def _parent_of(process: int) -> int | None:
    """Its parent, or the process that adopted it; None where it does not exist."""
    try:
        return psutil.Process(process).ppid()
    except psutil.Error:
        return None


def _is_launcher(process: int) -> bool:
    """`deepspeed`, `torchrun` and their parts. The process that started such a command may end before it (nohup)."""
    return any(word.rpartition("/")[2] in _LAUNCHERS for word in _command(process)) or _is_on_host(process)


def _is_on_host(process: int) -> bool:
    """DeepSpeed's launcher of one host, or the shell that ssh started for it.

    The `deepspeed` command or sshd's session starts these, never a person, and must stay alive.
    """
    return any(_ON_A_HOST in word for word in _command(process))


def _command(process: int) -> list[str]:
    """The first words: python [options] SCRIPT or -m MODULE. The training's own arguments follow them."""
    try:
        return psutil.Process(process).cmdline()[:5]
    except psutil.Error:
        return []


# --- what ends a process that cannot end itself ---

# Kills the process PID unless a byte comes at least every LIMIT seconds; ends when the process does (end of file).
# Where its parent, the launcher, is stopped as well, the entire job is: Ctrl-Z. That is a pause.
_KILLER = """
import os, psutil, select, sys
process, limit, silent = psutil.Process(int(sys.argv[1])), float(sys.argv[2]), 0
while silent < 2 and (not (ready := select.select([0], [], [], limit / 2)[0]) or os.read(0, 4096)):
    job = (process, process.parent())
    paused = not ready and all(one and one.status() == "stopped" for one in job)
    silent = 0 if ready or paused else silent + 1
if silent == 2:
    process.kill()
"""


class WatchdogProcess:
    """A small process beside this one that kills it when it stops sending.

    A process that is stopped (SIGSTOP) or whose interpreter is blocked cannot run the thread that would end it, and
    would hold its GPUs for good.
    """

    def __init__(self, limit: float) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-c", _KILLER, str(os.getpid()), str(limit)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what stops this process's group must not stop it
        )
        assert self._child.stdin is not None
        self._pipe = self._child.stdin

    def alive(self) -> None:
        """Call it more often than every `limit` seconds."""
        with contextlib.suppress(OSError):  # it was killed; the run continues without it
            self._pipe.write(b".")
            self._pipe.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._child.wait()
