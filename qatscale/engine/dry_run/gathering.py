"""Which weights ZeRO-3 has gathered at each moment: DeepSpeed 0.19.8's `PartitionedParameterCoordinator`, replayed.

It gathers a module's parameters when the module is entered, and of those that follow in the trace of the last pass as
many as the prefetch bucket allows, every time anew: it runs ahead up to `stage3_max_live_parameters`. It lets go of a
parameter after its module, unless it is used again within `stage3_max_reuse_distance` elements, or the prefetch has
seen that use already and passed over it because the parameter was there: about the turn from forward to backward.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from qatscale.engine.dry_run.share import Share
from qatscale.engine.dry_run.zero_plan import ZeroPlan


class Use(NamedTuple):
    tensor: int
    released: bool = True
    """Whether it may be let go afterwards. Not where the same module is recomputed in between, and not the table of a
    tied embedding: DeepSpeed keeps what two modules own to the end of backward (as was seen)."""


Trace = list[Use | None]
"""Modules in the order they are entered: the use of one that has a matrix; None for others, such as blocks and norms,
at which prefetching goes on as well."""


def trace_of(share: Share, *, recompute: bool) -> Trace:
    """Of one micro-batch. Tensors are counted as `share.matrices()` gives them; a tied head is tensor 0."""
    first = 1 if share.embed else 0
    embed: Trace = [Use(0, not share.tied_here)] if share.embed else []
    head = Use(0, False) if share.tied_here else Use(first + len(share.block) * share.blocks)
    trace: Trace = [None, *embed]
    turned: list[Trace] = []
    for block in range(share.blocks):
        q, k, v, o, gate, up, down = (Use(first + len(share.block) * block + offset) for offset in range(7))
        trace += [None, None, None, q, k, v, o, None, None, gate, up, down]
        asked: Trace = [None, None, down]
        if recompute:  # what `down` saved is asked for first: there the block is computed again, up to `down`
            again = down._replace(released=False)
            asked = [None, None, again, None, None, None, q, k, v, o, None, None, gate, up, down]
        turned.append([*asked, up, gate, None, None, o, v, k, q, None])
    if share.head:
        trace += [None, head, None, head, None]
    for block_backward in reversed(turned):
        trace += block_backward
    return trace + embed


class Gathering:
    """One pass over a trace. `use` and `done` are called for its tensors in its order.

    sizes: elements of each tensor. Those that stay whole, up to `persists_up_to`, are never gathered.
    """

    def __init__(self, trace: Trace, sizes: list[int], plan: ZeroPlan) -> None:
        self.sizes, self.plan = sizes, plan
        self.trace = [use.tensor if use and sizes[use.tensor] > plan.persists_up_to else None for use in trace]
        self.live: set[int] = set()
        self.start()

    def start(self) -> None:
        """Of a micro-batch: all is let go, the queue is the whole trace."""
        self.live.clear()
        self.step = 0
        self.seen = dict.fromkeys(self.trace, -1)
        """Tensor → the last of its uses that the queue was emptied over."""
        self.queue = deque((tensor, step) for step, tensor in enumerate(self.trace) if tensor is not None)

    def use(self, tensor: int) -> tuple[list[int], list[int]]:
        """Tensors gathered now: for this use, and ahead."""
        if self.sizes[tensor] <= self.plan.persists_up_to:
            return [], []
        ahead: list[int] = []
        while self.trace[self.step] is None:
            ahead += self._prefetch()
            self.step += 1
        assert self.trace[self.step] == tensor, f"step {self.step} uses {self.trace[self.step]}, not {tensor}"
        now = [] if tensor in self.live else [tensor]
        self.live.add(tensor)
        if self.seen[tensor] < self.step:
            passed, step = self.queue.popleft()
            self.seen[passed] = step
        ahead += self._prefetch()
        self.step += 1
        return now, ahead

    def _prefetch(self) -> list[int]:
        found: list[int] = []
        room = min(self.plan.prefetch, self.plan.most_live - sum(self.sizes[tensor] for tensor in self.live))
        while self.queue and sum(self.sizes[tensor] for tensor in found) < room:
            tensor, step = self.queue.popleft()
            self.seen[tensor] = max(self.seen[tensor], step)
            if tensor not in self.live and tensor not in found:
                found.append(tensor)
        self.live.update(found)
        return found

    def done(self, tensor: int) -> bool:
        """Whether it is let go."""
        if tensor not in self.live or self.seen[tensor] > self.step:
            return False
        passed = 0
        for other in self.trace[self.step :]:
            if passed >= self.plan.reuse_distance:
                break
            if other == tensor:
                return False
            passed += self.sizes[other] if other is not None else 0
        self.live.remove(tensor)
        return True


def gathered(share: Share, plan: ZeroPlan, *, recompute: bool) -> int:
    """Elements that a micro-batch gathers."""
    sizes = [matrix.numel for matrix in share.matrices()]
    trace = trace_of(share, recompute=recompute)
    gathering = Gathering(trace, sizes, plan)
    total = 0
    for use in filter(None, trace):
        now, ahead = gathering.use(use.tensor)
        total += sum(sizes[tensor] for tensor in (*now, *ahead))
        if use.released:
            gathering.done(use.tensor)
    return total
