"""Signals that ask a run to stop: it finishes the step, saves, and exits with a code that asks to be started again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from qatscale.engine.agreement import Agreement
from qatscale.engine.runtime import Runtime
from qatscale.errors import exit_code

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""Pre-emption (the first two), a terminal that closes, Ctrl-C."""
START_GRACE = 1.0
"""Seconds in which a start may end in order."""


class Stopped(Exception):  # noqa: N818 - no error
    """All processes agreed to stop where nothing has to be saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def catch(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Let `handler` take the signals; returns those before. A signal that was ignored before (nohup) stays ignored."""
    return {one: signal.signal(one, handler) for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN}


class StopRequest:
    """A context in which all processes agree, at the same step, whether any of them was asked to stop.

    A signal may reach one process only, or several at different steps. So every step ends with a vote and reads the
    result of the vote before: all processes read the same, and none waits for it.

    A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int = 0
        """The number of the first signal this process got, or 0."""
        self._agreement: Agreement | None = None
        self._before = catch(self._on_signal)
        self._starting: int | None = self._end_a_blocked_start()

    def _end_a_blocked_start(self) -> int:
        """Until `join` the main thread may wait for the other processes inside a library, where it runs no handler.

        A thread then ends the process: nothing is lost yet. Returns the end of the pipe that wakes it.
        """
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)

        def wait() -> None:
            number = os.read(woken, 1)
            os.close(woken)
            if number and number[0] in self._before:
                time.sleep(START_GRACE)
                if self._starting is not None:
                    print(f"{signal.Signals(number[0]).name}: stopped before the first step", flush=True)
                    os._exit(exit_code(number[0]))

        threading.Thread(target=wait, name="signals", daemon=True).start()
        return wakes

    def _started(self) -> None:
        if self._starting is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._starting)
            self._starting = None

    def join(self, runtime: Runtime) -> None:
        """Agree with the job's other processes from now on. Collective."""
        self._started()
        self._agreement = Agreement(runtime) if runtime.ranks > 1 else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the handler's signature
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def agreed(self) -> int:
        """The signal's number once all processes know of it, else 0. Call it once after every step on every process."""
        if self._agreement is None:
            return self.received
        agreed = self._agreement.voted()
        self._agreement.vote(self.received)
        return agreed

    def check(self) -> None:
        """Raise `Stopped`, on all processes, if one of them was asked to stop. Collective."""
        if number := self.agreed():
            raise Stopped(number)

    def check_now(self) -> None:
        """As `check`, for a signal of this moment, too: waits for the other processes."""
        self.check()
        if self._agreement is not None and (number := self._agreement.voted()):
            raise Stopped(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restore the signal handlers. After an error they stay: the launcher ends processes with SIGTERM when one has
        failed, and the error has yet to be reported; and the other processes may never reach this point."""
        self._started()
        if kind is not None and self._agreement is not None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
