"""What a process cannot do for itself: end when it is stopped, and notice that whoever launched it is gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from qatscale.supervise.process import parent_of

# Ends the process PID unless a byte comes at least every LIMIT seconds; leaves when the process does (end of file).
_GUARD = """
import os, select, signal, sys
pid, limit = int(sys.argv[1]), float(sys.argv[2])
while select.select([0], [], [], limit)[0]:
    if not os.read(0, 4096):
        sys.exit()
os.kill(pid, signal.SIGKILL)
"""

_ON_A_HOST = "deepspeed.launcher.launch"
_LAUNCHERS = {"deepspeed", "torchrun", "torch.distributed.run", _ON_A_HOST}


class Guard:
    """A small process beside this one that kills it when it gives no sign of life: a process that is stopped (SIGSTOP)
    or whose interpreter is blocked cannot even run the thread that would end it, and holds its GPUs for good."""

    def __init__(self, limit: float) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), str(limit)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what stops this process's group must not stop it
        )

    def alive(self) -> None:
        """Call it more often than every `limit` seconds."""
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # somebody ended the guard; the run does without
            self._child.stdin.write(b".")
            self._child.stdin.flush()

    def close(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        self._child.wait()


class Launchers:
    """The processes of DeepSpeed's or torch's launcher that this one descends from.

    SIGTERM to the single-node `deepspeed` command ends that command and nothing else: its launcher and the training
    processes stay, without a parent. The same happens on a remote host whose ssh connection ends.
    """

    def __init__(self, first: int | None = None) -> None:
        self._chain: list[tuple[int, int]] = []
        """(process, its parent), upwards as far as it is a launcher's doing."""
        process = os.getpid() if first is None else first
        while (parent := parent_of(process)) and parent > 1 and (_is_launcher(parent) or _is_on_host(process)):
            self._chain.append((process, parent))
            process = parent

    def gone(self) -> bool:
        """Whether one of them has ended: its child has another parent now."""
        return any(parent_of(process) != parent for process, parent in self._chain)


def _is_launcher(process: int) -> bool:
    """`deepspeed`, `torchrun` and their parts. Who started such a command may leave it alone (nohup)."""
    return any(word.rpartition("/")[2] in _LAUNCHERS for word in _command(process)) or _is_on_host(process)


def _is_on_host(process: int) -> bool:
    """DeepSpeed's launcher of one host, or the shell that ssh started for it: no person starts these, and whoever did
    (the `deepspeed` command, sshd's session) has to stay."""
    return any(_ON_A_HOST in word for word in _command(process))


def _command(process: int) -> list[str]:
    """The first words: python [options] SCRIPT or -m MODULE; behind them come the training's own arguments."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:5]
    except OSError:
        return []
