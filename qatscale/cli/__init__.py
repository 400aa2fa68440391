"""The commands of `qatscale`. Each imports what it needs when it runs, so that --help and plan answer at once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qatlaw.errors import InputError
from qatscale.cli.broken_pipe import PATIENCE, IgnoreBrokenPipe
from qatscale.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE, PLACES, errno_of, fault
from qatscale.supervise.launchers import launcher_environment

TRAINING = ("train", "resume", "branch")
"""Commands that several processes run together."""
_CONTINUING = (*TRAINING, "study", "quickstart", "prepare", "landscape")
"""Commands that continue when they are started again."""
_LATER = 5.0


def main(arguments: list[str] | None = None) -> None:
    """Run a command line, of training on this process of a job: torchrun's, DeepSpeed's, srun's or mpirun's.

    Wrong input gives one message and exit code 2.

    So does a place that cannot be read or written. Another fault of the machine (a full disk) or a diverged run gives
    one message and exit code 1; the run's log has the traceback. In a job of many processes the first one reports. The
    others wait a few seconds: the launcher ends them when the first one exits, and an error of a single process is
    still reported.
    """
    own_process = arguments is None
    words = sys.argv[1:] if arguments is None else arguments
    command = words[:1]
    continues = bool(command) and command[0] in _CONTINUING
    stdout, sys.stderr = (IgnoreBrokenPipe(one, PATIENCE if continues else None) for one in (sys.stdout, sys.stderr))
    sys.stdout = stdout
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if own_process and signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            requeues = continues and number != signal.SIGINT  # until a run has handlers of its own, nothing is to save
            signal.signal(number, (lambda *_: os._exit(EXIT_REQUEUE)) if requeues else _interrupt)
    with _finished(words, own_process):
        try:
            _check_text(words, own_process)
            from qatscale.cli.app import app

            if command and command[0] in TRAINING:
                from qatscale.supervise.process import launched_by

                launched_by()
                os.environ.update(launcher_environment(os.environ))
                # torch's C++ side prints a stack of its own for every connection that breaks, below what we report
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            try:
                app(arguments, prog_name="qatscale")
            finally:
                if not continues:
                    stdout.finish()
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)
        except InputError as error:
            rank = os.environ.get("RANK", "0")
            time.sleep(_LATER if rank != "0" else 0)
            print(f"error: {error}" + (f" (process {rank})" if rank != "0" else ""), file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT)
        except Exception as error:
            if fault(error) is None:
                raise
            print("\n".join([f"error: {fault(error)}", *getattr(error, "__notes__", [])]), file=sys.stderr)
            sys.exit(EXIT_BAD_INPUT if errno_of(error) in PLACES else EXIT_FAILED)


def _check_text(words: list[str], own_process: bool) -> None:
    """InputError for a word that is not UTF-8, which no recipe can record. A locale of another encoding is left."""
    for word in (*words, os.environ.get("PWD", "")):
        try:
            word.encode()
        except UnicodeEncodeError:
            try:
                os.fsencode(word).decode()
            except UnicodeError:
                raise InputError("argument or working folder", word, "is not UTF-8.", "Rename it.") from None
            if own_process:
                os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONUTF8": "1"})


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the handler's signature
    """KeyboardInterrupt or SystemExit, so that what is half written is removed; a second signal ends at once.

    So does one amid an import of torch, whose C++ side would abort. The exit code is that of shells.
    """
    signal.signal(number, lambda *_: os._exit(128 + number))
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        os._exit(128 + number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def _finished(words: list[str], own_process: bool) -> Iterator[None]:
    """After this context a signal ends the process with the code of its command, amid what libraries clean up.

    The process ends when they have. Python's own teardown takes another second with torch, and heeds no handler. A
    wrong input, Typer's too, is followed by hints about the paths in it.
    """
    code = 0
    if own_process:  # the first one is called last
        atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(code)))
    try:
        yield
    finally:
        error = sys.exception()
        code = getattr(error, "code", EXIT_FAILED if error else 0) or 0
        if code == EXIT_BAD_INPUT:
            from qatscale.cli.kinds import hints

            for line in hints(words):
                print(line, file=sys.stderr)
        sys.stdout.flush()
        if own_process:
            sys.unraisablehook = lambda _: None  # the result is out; failed clean-ups of libraries follow
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            if own_process and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: os._exit(code))
