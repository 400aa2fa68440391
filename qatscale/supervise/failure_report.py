"""Which failure of a job to report: records, their order, and the message. Pure functions.

One process fails, and a moment later all others do, each with a complaint about a broken connection. A person needs the
traceback of the first one, and its rank and host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

Kind = Literal["error", "gone", "silent", "stalled", "consequence", "witness"]
"""`error`: an exception of the process itself. `gone`: its process ended without a word. `silent`: no heartbeat.
`stalled`: alive, and the others wait for it. `consequence`: an exception because another process failed.
`witness`: alive and waiting for the others when the job ended; no failure."""
_ORDER: tuple[Kind, ...] = ("error", "gone", "silent", "stalled", "consequence", "witness")

_HAPPENED: dict[Kind, str] = {
    "error": "failed", "gone": "died", "silent": "fell silent", "stalled": "hung", "consequence": "failed",
    "witness": "waited",
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**fields)

    @property
    def sentence(self) -> str:
        return f"rank {self.rank} on host {self.host} {_HAPPENED[self.kind]} at step {self.step}: {self.error}"


def is_consequence(error: BaseException) -> bool:
    """Whether an exception only says that other processes are out of reach."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN_CONNECTION.search(str(error)) is not None


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The failure to report: causes before consequences, then the earliest."""
    return min(failures, key=lambda failure: (_ORDER.index(failure.kind), failure.time, failure.rank))


@dataclass(frozen=True)
class Standing:
    """How far a process has come when nothing moves."""

    rank: int
    step: int
    waits: bool
    """Its main thread is inside a call of the communication library."""
    collectives: int
    """Collectives that it has entered since its start."""


def stragglers(standings: Sequence[Standing]) -> list[int]:
    """The ranks that the others wait for; all ranks where nothing tells them apart.

    A process that computes or sleeps while others wait in a collective is one. Where none is seen waiting (NCCL's calls
    return at once, and the wait is elsewhere), it is the process that lies behind: fewer steps, then fewer collectives.
    """
    busy = [standing for standing in standings if not standing.waits]
    candidates = busy if 0 < len(busy) < len(standings) else list(standings)
    last = min((standing.step, standing.collectives) for standing in candidates)
    return [standing.rank for standing in candidates if (standing.step, standing.collectives) == last]


def in_communication(frames: Sequence[tuple[str, str]]) -> bool:
    """Whether a stack, innermost (file, function) first, is inside torch.distributed or DeepSpeed's wrappers of it."""
    return any("torch/distributed/" in file or "deepspeed/comm/" in file for file, _ in frames[:6])


def job_failures(heartbeats: Sequence[Mapping[str, Any]], missing: Mapping[int, Failure]) -> list[Failure]:
    """All failures of a job, from what its processes say of themselves and have seen of others.

    heartbeats: the last one of each process that answered,
    ``{"rank", "step", "failure", "seen", "waits", "collectives"}``. missing: rank → its failure, for each that did not.
    A process's own traceback outranks what others have seen of it. An answer without a traceback proves nothing: over a
    cut wire both sides still write into a shared folder.
    """
    own = [Failure.from_dict(heartbeat["failure"]) for heartbeat in heartbeats if heartbeat["failure"]]
    confessed = {failure.rank for failure in own if failure.kind == "error"}
    seen = [Failure.from_dict(heartbeat["seen"]) for heartbeat in heartbeats if heartbeat["seen"]]
    others = dict(missing)
    for failure in sorted(seen, key=lambda failure: -failure.time):  # the earliest wins
        if failure.rank not in confessed:
            others[failure.rank] = failure
    failures = [*own, *others.values()]
    if any(failure.kind != "witness" for failure in failures):
        return failures
    standings = [Standing(beat["rank"], beat["step"], beat["waits"], beat["collectives"]) for beat in heartbeats]
    last = stragglers(standings)
    return [replace(failure, kind="stalled") if failure.rank in last else failure for failure in failures]


def report(failures: Sequence[Failure], logs: str) -> str:
    """The last message of a job: the first failure in full, then one line for each other process to blame."""
    first = first_failure(failures)
    several = first.kind in ("gone", "silent", "stalled")
    blamed = [failure.sentence for failure in failures if several and failure.kind == first.kind and failure != first]
    lines = ["=" * 80, *filter(None, [first.text.strip()]), first.sentence, *blamed]
    return "\n".join([*lines, f"logs of all ranks: {logs}; the same command continues from the newest checkpoint"])
