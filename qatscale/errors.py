"""What a user reads when an input is wrong, and the exit codes a script can branch on."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Sequence

from qatlaw.errors import InputError, cut
from qatlaw.errors import did_you_mean as did_you_mean
from qatlaw.errors import first_invalid as first_invalid
from qatlaw.errors import nearest as nearest

EXIT_OK = 0
EXIT_FAILED = 1
"""An unexpected failure: a bug, a dead device, a full disk."""
EXIT_BAD_INPUT = 2
"""The input is wrong; nothing was started."""
EXIT_REQUEUE = 75
"""Stopped by a signal after saving; the same command continues (sysexits.h: EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C, after saving (128 + SIGINT, as shells have it)."""


def exit_code(number: int) -> int:
    """The exit code of a command that this signal stopped."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE


class UserError(InputError):
    """A wrong input of a run: a recipe's key, an option, a file or a folder."""


SHOWN = 30
"""Problems that a message lists."""


class FailedError(RuntimeError):
    """A failure at no fault of the input. Its message says what a person needs: a traceback would not help."""


class UserErrors(UserError):  # noqa: N818 - several of them
    """Several wrong inputs at once, so that one try corrects them all. `key`, `value`... are those of the first."""

    def __init__(self, problems: Sequence[UserError]) -> None:
        first = problems[0]
        super().__init__(first.key, first.value, first.problem, first.fix)
        self.problems = tuple(problems)
        lines = [f"  {problem}" for problem in problems[:SHOWN]]
        more = [f"  and {len(problems) - SHOWN} more"] if problems[SHOWN:] else []
        self.args = ("\n".join([f"{len(problems)} problems:", *lines, *more]),)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.problems,)


_DISK = "Free some space, or choose another disk."
PLACES = {
    **dict.fromkeys((
        errno.EPERM, errno.ENOENT, errno.EACCES, errno.EBUSY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL,
        errno.EROFS,
    ), "Choose a place that you may write to and read from."),
    errno.ENAMETOOLONG: "Choose a shorter name.", errno.ELOOP: "Name the place itself, not a link.",
}  # fmt: skip
"""What to do where a place can be no file or folder of this user."""
_FAULTS = {
    errno.ENOSPC: _DISK, errno.EDQUOT: _DISK, errno.EFBIG: "Raise the limit (ulimit -f), or choose another disk.",
    **dict.fromkeys((errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP), "Mount it with locks, or choose another disk."),
    errno.EMFILE: "Raise the limit (ulimit -n).", errno.ENFILE: "", errno.EIO: "", errno.ESTALE: "", **PLACES,
}  # fmt: skip
"""What to do about an error of the operating system."""


def fault(error: BaseException) -> str | None:
    """What happened and what to do, where the machine is at fault, or a run has diverged or failed a check of its own.

    None for any other exception.
    """
    if isinstance(error, (FloatingPointError, FailedError)):
        return str(error)
    if isinstance(error, MemoryError) or re.search("out of memory. Tried|can't allocate memory", str(error)):
        return f"not enough memory: {cut(str(error))}; `train --dry-run` shows what a run takes."
    number = errno_of(error)
    if not isinstance(error, OSError) or number not in _FAULTS:
        return None
    text = re.sub(r"\[Errno \d+\] ", "", str(error))
    plain = f"{cut(str(error.filename))}: {error.strerror}" if error.filename else text
    return f"{plain}. {_FAULTS[number]}".rstrip()


def errno_of(error: BaseException) -> int:
    """The number of an error of the operating system, also of a process that another one reports; 0: none."""
    found = re.search(r"\[Errno (\d+)\] ", str(error))
    return int(found[1]) if found else 0


def first_line(error: Exception) -> str:
    """Another library's message, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
