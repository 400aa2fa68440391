"""Which failure of a job of many processes is the one to tell: records, their order, the message. Pure functions.

One process fails, and a moment later all others do, each with a complaint about a broken connection. A person wants the
first one's traceback, and who it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

Kind = Literal["error", "gone", "silent", "stalled", "consequence", "witness"]
"""`error`: an exception of the process itself. `gone`: its process ended without a word. `silent`: no sign of life.
`stalled`: alive, and it holds the others up. `consequence`: an exception because another process failed.
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
class Fault:
    """What is known of one process when a job fails."""

    rank: int
    host: str
    step: int
    time: float
    """Seconds since 1970 by rank 0's clock."""
    kind: Kind
    error: str
    """In one line."""
    text: str = ""
    """The traceback, or where the main thread stood."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**fields)

    @property
    def sentence(self) -> str:
        return f"rank {self.rank} on host {self.host} {_HAPPENED[self.kind]} at step {self.step}: {self.error}"


def is_consequence(error: BaseException) -> bool:
    """Whether an exception says no more than that other processes are out of reach."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN_CONNECTION.search(str(error)) is not None


def first_fault(faults: Sequence[Fault]) -> Fault:
    """The failure to tell: causes before consequences, then the earliest."""
    return min(faults, key=lambda fault: (_ORDER.index(fault.kind), fault.time, fault.rank))


@dataclass(frozen=True)
class Standing:
    """How far a process has come when nothing moves. `collectives`: how many it has entered since its start."""

    rank: int
    step: int
    waits: bool
    """Its main thread is inside a call of the communication library."""
    collectives: int


def holding_up(standings: Sequence[Standing]) -> list[int]:
    """The ranks that the others wait for; all of them where there is nothing to tell them apart.

    Who computes or sleeps while others wait in a collective holds them up. Where none is seen waiting (NCCL's calls
    return at once and the wait is somewhere else), it is who lies behind: fewer steps, then fewer collectives entered.
    """
    busy = [standing for standing in standings if not standing.waits]
    candidates = busy if 0 < len(busy) < len(standings) else list(standings)
    last = min((standing.step, standing.collectives) for standing in candidates)
    return [standing.rank for standing in candidates if (standing.step, standing.collectives) == last]


def in_communication(frames: Sequence[tuple[str, str]]) -> bool:
    """Whether a stack, innermost (file, function) first, is inside torch.distributed or DeepSpeed's wrappers of it."""
    return any("torch/distributed/" in file or "deepspeed/comm/" in file for file, _ in frames[:6])


def job_faults(notes: Sequence[Mapping[str, Any]], missing: Mapping[int, Fault]) -> list[Fault]:
    """Everything that went wrong, from what the processes say of themselves and have seen of others.

    notes: per process that answered ``{"rank", "step", "fault", "seen", "waits", "collectives"}``. missing: rank → what
    is to be said of it, for each that did not. A process's own traceback counts more than what others have seen of it;
    an answer without one proves nothing, for over a cut wire both sides write into a shared folder.
    """
    own = [Fault.from_dict(note["fault"]) for note in notes if note["fault"]]
    confessed = {fault.rank for fault in own if fault.kind == "error"}
    seen = [Fault.from_dict(note["seen"]) for note in notes if note["seen"]]
    others = dict(missing)
    for fault in sorted(seen, key=lambda fault: -fault.time):  # the earliest wins
        if fault.rank not in confessed:
            others[fault.rank] = fault
    faults = [*own, *others.values()]
    if any(fault.kind != "witness" for fault in faults):
        return faults
    standings = [Standing(note["rank"], note["step"], note["waits"], note["collectives"]) for note in notes]
    guilty = holding_up(standings)
    return [replace(fault, kind="stalled") if fault.rank in guilty else fault for fault in faults]


def message(faults: Sequence[Fault], logs: str) -> str:
    """What the job says last: the first failure whole, then in a line who else it was, if several are to blame."""
    first = first_fault(faults)
    blamed = [f for f in faults if f.kind == first.kind and f is not first and f.kind in ("gone", "silent", "stalled")]
    lines = ["=" * 80, *filter(None, [first.text.strip()]), first.sentence, *(fault.sentence for fault in blamed)]
    return "\n".join([*lines, f"logs of all ranks: {logs}; the same command goes on from the newest checkpoint"])
