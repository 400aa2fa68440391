"""The identity of a process, and whether it still runs.

A process id alone does not identify a process: ids are used again, and a folder may lie on a disk that several machines
share. Host, boot id and start tick together identify it for good. Linux `proc(5)`: field 22 of `/proc/PID/stat` is the
start time in clock ticks since boot, which no change of the wall clock can touch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ZOMBIE_OR_DEAD = {"Z", "X", "x"}


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


def is_alive(process: Mapping[str, Any]) -> bool | None:
    """Whether the process of `identity()` still runs; None where it cannot be known here, since the process belongs to
    another machine or to another container of this one.

    A zombie (ended, not yet collected by its parent) counts as dead.
    """
    if process["host"] != socket.gethostname() or process.get("namespace") not in (None, _namespace()):
        return None
    if process["boot_id"] is None:
        return _answers(process["pid"])
    if process["boot_id"] != _boot_id():
        return False
    stat = _stat(process["pid"])
    return stat is not None and stat[0] not in _ZOMBIE_OR_DEAD and stat[1] == process["start_ticks"]


def parent_of(pid: int) -> int | None:
    """The parent of a process, or the process that adopted it; None where `pid` does not exist."""
    stat = _stat(pid)
    return stat[2] if stat else None


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state letter, start tick, parent) of a process; None where it does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # field 2 is the command in parentheses and may itself hold spaces and parentheses
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19]), int(fields[1])


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


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
