"""What is held in memory while a step is replayed on paper: amounts by kind, and the moment at which they peak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Kind = Literal["weights", "gradients", "optimizer", "scales", "quantized", "activations", "buffers", "host"]
"""`weights`: those that forward reads, gathered ones included. `gradients`: of weights, all their copies. `optimizer`:
fp32 masters and Adam's moments of the weights. `scales`: α, its gradients and its optimizer state. `quantized`: the
fake-quantized copies that autograd or the step keeps, and what quantizing needs meanwhile. `activations`:
all else that a micro-batch makes. `buffers`: communication. `host`: offloaded, not on the device."""
KINDS: tuple[Kind, ...] = get_args(Kind)
ON_DEVICE: tuple[Kind, ...] = KINDS[:-1]


class Ledger:
    """Bytes. `peak` and `peak_at` are of the moment with the most on the device."""

    def __init__(self) -> None:
        self.held: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.moment = ""
        """What is going on; set by who replays it."""
        self.peak: dict[Kind, int] = dict(self.held)
        self.peak_at = ""
        self._most = 0

    def hold(self, kind: Kind, size: int) -> None:
        self.held[kind] += size
        most = sum(self.held[kind] for kind in ON_DEVICE)
        if most > self._most:
            self._most, self.peak, self.peak_at = most, dict(self.held), self.moment

    def drop(self, kind: Kind, size: int) -> None:
        self.held[kind] -= size
        assert self.held[kind] >= 0, f"{kind}: dropped {-self.held[kind]} bytes that were never held"

    @contextmanager
    def meanwhile(self, kind: Kind, size: int) -> Iterator[None]:
        """Hold something for as long as the block lasts."""
        self.hold(kind, size)
        yield
        self.drop(kind, size)

    def touch(self, kind: Kind, size: int) -> None:
        """Hold something for a moment."""
        self.hold(kind, size)
        self.drop(kind, size)
