"""Which failure of a job to report: records, their order, and the message. Pure functions.

One process fails, and a moment later all others do, each with a complaint about a broken connection. A person needs the
traceback of the first one, and its rank and host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Kind = Literal["error", "fault", "gone", "silent", "stalled", "consequence", "witness"]
"""Causes before consequences. `error`: an exception of the process itself. `fault`: of its machine, as a full disk.
`gone`: its process ended without a word. `silent`: no heartbeat. `stalled`: alive, and the others wait for it.
`consequence`: an exception because another process failed.
`witness`: alive and waiting for the others when the job ended; no failure."""
_HAPPENED: dict[Kind, str] = {
    "error": "failed", "fault": "failed", "gone": "died", "silent": "fell silent", "stalled": "hung",
    "consequence": "failed", "witness": "waited",
}  # fmt: skip

_BROKEN_CONNECTION = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|timed out)|broken pipe|timed out (waiting|after)|socket timeout"
    r"|no route to host|wait timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """What is known of one process when its job fails."""

    rank: int
    host: str
    step: int
    time: float
    """Seconds since 1970 by rank 0's clock."""
    kind: Kind
    error: str
    """One line."""
    text: str = ""
    """The traceback, or the stack of the main thread."""

    @property
    def sentence(self) -> str:
        return f"rank {self.rank} on host {self.host} {_HAPPENED[self.kind]} at step {self.step}: {self.error}"


def is_consequence(error: BaseException) -> bool:
    """Whether an exception only means that other processes are out of reach."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN_CONNECTION.search(str(error)) is not None


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The failure to report: causes before consequences, then the earliest."""
    return min(failures, key=lambda failure: (get_args(Kind).index(failure.kind), failure.time, failure.rank))


def stragglers(heartbeats: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ranks that the others wait for; all ranks where nothing tells them apart.

    `waits`: the main thread is inside a call of the communication library. A process that computes or sleeps while
    others wait is a straggler. Where none is seen waiting (NCCL's calls return at once, and the wait is elsewhere), it
    is the process that lies behind: fewer steps, then fewer collectives entered.
    """
    busy = [beat for beat in heartbeats if not beat["waits"]]
    candidates = busy if 0 < len(busy) < len(heartbeats) else heartbeats
    last = min((beat["step"], beat["collectives"]) for beat in candidates)
    return [beat["rank"] for beat in candidates if (beat["step"], beat["collectives"]) == last]


def job_failures(heartbeats: Sequence[Mapping[str, Any]], missing: Mapping[int, Failure]) -> list[Failure]:
    """All failures of a job, from what its processes say of themselves and have seen of others.

    heartbeats: the last one of each process that answered,
    ``{"rank", "step", "failure", "seen", "waits", "collectives"}``. missing: rank → its failure, for each that did not.
    A process's own traceback outranks what others have seen of it. An answer without a traceback proves nothing: over a
    cut wire both sides still write into a shared folder.
    """
    own = [Failure(**heartbeat["failure"]) for heartbeat in heartbeats if heartbeat["failure"]]
    confessed = {failure.rank for failure in own if failure.kind in ("error", "fault")}
    seen = [Failure(**heartbeat["seen"]) for heartbeat in heartbeats if heartbeat["seen"]]
    others = dict(missing)
    for failure in sorted(seen, key=lambda failure: -failure.time):  # the earliest wins
        if failure.rank not in confessed:
            others[failure.rank] = failure
    failures = [*own, *others.values()]
    if any(failure.kind != "witness" for failure in failures):
        return failures
    last = stragglers(heartbeats)
    return [replace(failure, kind="stalled") if failure.rank in last else failure for failure in failures]


def report(failures: Sequence[Failure], logs: str) -> str:
    """The last message of a job: the first failure in full, then one line for each other process to blame.

    The traceback of a fault is in the log of its rank alone, and its own sentence says what to do.
    """
    first = first_failure(failures)
    several = first.kind in ("gone", "silent", "stalled")
    blamed = [failure.sentence for failure in failures if several and failure.kind == first.kind and failure != first]
    text = "" if first.kind == "fault" else first.text.strip()
    lines = ["=" * 80, *filter(None, [text]), first.sentence, *blamed]
    advice = "" if first.kind == "fault" else "; the same command continues from the newest checkpoint"
    return "\n".join([*lines, f"logs of all ranks: {logs}{advice}"])
