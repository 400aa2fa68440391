"""What DeepSpeed 0.19.8 holds of weights, gradients and optimizer state, replayed on paper.

ZeRO's table (arXiv 1910.02054: 16 bytes a parameter, so many of them divided by the processes) is of what has to be
there. What is there also follows from how DeepSpeed moves gradients, and differs by optimizer:

`Bf16ZeroOne`
    ZeRO-1 in bf16 with fp32 accumulation (`runtime/bf16_optimizer.py`): every process keeps all gradients in fp32,
    always, and in bf16 through the step. They are reduced in buckets of 5e8 elements, which are copies where they hold
    several groups (`runtime/engine.py`, `allreduce_no_retain`).
`ZeroOneTwo`
    ZeRO-1 and 2 else (`runtime/zero/stage_1_and_2.py`): gradients pass a bucket of `reduce_bucket_size`; ZeRO-1 keeps
    them all until the last micro-batch, ZeRO-2 the parameters of its partition. In fp32 the step copies the partition
    once more; in bf16 (`compact`) it is accumulated in fp32 in place.
`ZeroThree`
    ZeRO-3 (`runtime/zero/stage3.py`): shards of everything; weights gathered around their use, see
    `qatscale.engine.dry_run.gathering`. Gradients pass a bucket of `reduce_bucket_size` that is always there.

Sizes are in elements unless they say bytes; masters and moments are fp32. Left out: lists of Python objects, and what a
parameter costs that gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from qatscale.engine.dry_run.gathering import Gathering, trace_of
from qatscale.engine.dry_run.ledger import Kind, Ledger
from qatscale.engine.dry_run.share import Share
from qatscale.engine.dry_run.zero_plan import FP32, ZeroPlan, partition

NORM = 8
"""Gradient norms are taken in fp64 of one parameter at a time (`runtime/zero/utils.py`, `get_norm_dtype`)."""
_BF16_BUCKET = 500_000_000
"""`MEMORY_OPT_ALLREDUCE_SIZE` of `runtime/engine.py`."""


class Zero(Protocol):
    """The life of parameters and gradients through a step, as its replay tells it."""

    def resident(self) -> None:
        """What is held between steps, once one was taken."""

    def fetch(self, tensor: int) -> None:
        """Matrix `tensor` of the share is about to be used."""

    def release(self, tensor: int) -> None:
        """It was used."""

    def arrived(self, kind: Kind, size: int) -> None:
        """Backward made a gradient of `size` elements in the weights' precision, which the ledger has as `kind`."""

    def backward_done(self, last: bool) -> None:
        """A micro-batch's backward is over; `last`: of the step."""

    def step(self) -> None:
        """The optimizer steps; afterwards only what is `resident` is held."""


class _Groups:
    """Common to the three: a ledger, and where a group's numbers belong in it."""

    def __init__(self, ledger: Ledger, share: Share, plan: ZeroPlan, *, recompute: bool, pipelined: bool) -> None:
        self.ledger, self.share, self.plan = ledger, share, plan
        self.recompute, self.pipelined = recompute, pipelined
        self.groups = share.groups

    def kinds(self) -> Iterator[tuple[str, list[int], bool]]:
        for name, numels in self.groups.items():
            yield name, numels, name.startswith("scales")

    def hold(self, kind: Kind, is_scale: bool, size: int) -> None:
        self.ledger.hold("scales" if is_scale and kind != "host" else kind, size)

    def hold_states(self, is_scale: bool, size: int) -> None:
        """Masters and two moments of `size` elements; under offload also what the host needs to move them."""
        if self.plan.offloads:
            gradients, weights = FP32 * size, self.plan.weight * size
            self.ledger.hold("host", 3 * FP32 * size + gradients + (weights if self.plan.stage < 3 else 0))
        else:
            self.hold("optimizer", is_scale, 3 * FP32 * size)

    def fetch(self, tensor: int) -> None: ...

    def release(self, tensor: int) -> None: ...


class Bf16ZeroOne(_Groups):
    """DeepSpeed's BF16_Optimizer."""

    def resident(self) -> None:
        self.parts = {name: partition(numels, self.plan.data) for name, numels in self.groups.items()}
        for name, _, is_scale in self.kinds():
            flat = self.parts[name].size * self.plan.data
            self.hold("weights", is_scale, flat * self.plan.weight)
            self.hold("gradients", is_scale, flat * FP32)
            self.hold_states(is_scale, self.parts[name].size)
        self.arrivals: list[tuple[Kind, int]] = []
        self.filled = False

    def arrived(self, kind: Kind, size: int) -> None:
        if self.filled:  # added to what the micro-batches before it left there, set to zero
            self.ledger.drop(kind, size * self.plan.weight)
        else:
            self.arrivals.append((kind, size))

    def backward_done(self, last: bool) -> None:
        self.filled = True
        self.ledger.touch("gradients", FP32 * max(size for _, size in self.arrivals))
        if last:
            bucket: list[int] = []
            for name in self.groups:
                bucket.append(self.parts[name].size * self.plan.data)
                if sum(bucket) > _BF16_BUCKET or name == list(self.groups)[-1]:
                    copied = sum(bucket) * FP32 if len(bucket) > 1 else 0
                    self.ledger.touch("buffers", copied + (sum(bucket) * 2 if self.plan.reduced != FP32 else 0))
                    bucket = []

    def step(self) -> None:
        for kind, size in self.arrivals:
            self.ledger.drop(kind, size * self.plan.weight)
        self.arrivals, self.filled = [], False


class ZeroOneTwo(_Groups):
    """DeepSpeed's DeepSpeedZeroOptimizer."""

    def resident(self) -> None:
        plan = self.plan
        self.parts = {name: partition(numels, plan.data) for name, numels in self.groups.items()}
        for name, _, is_scale in self.kinds():
            self.hold("weights", is_scale, self.parts[name].size * plan.data * plan.weight)
            self.hold_states(is_scale, self.parts[name].size)
        if plan.offloads:
            largest = max(size for numels in self.groups.values() for size in numels) * plan.weight
            self.ledger.hold("host", largest)
            self.ledger.hold("buffers", largest)
        self.compact = plan.weight != plan.accumulated
        self.widens = self.compact and plan.stage == 1
        self.element = plan.accumulated if self.widens else plan.weight
        """Bytes of a gradient on its way to the partition."""
        self.whole: list[tuple[Kind, int]] = []
        """ZeRO-1: gradients that wait for the last micro-batch."""
        self.filled = False
        """Whether a micro-batch left gradients."""
        self.buffer = self.kept = self.carried = 0
        """Bytes: the bucket, the partition's gradients, and in fp32 ZeRO-2 those of earlier micro-batches."""
        self.in_bucket = 0
        self.unbuffered: list[tuple[Kind, int]] = []

    def arrived(self, kind: Kind, size: int) -> None:
        plan, ledger = self.plan, self.ledger
        if not self.buffer and plan.contiguous:
            self.buffer = plan.bucket * plan.buckets * self.element
            ledger.hold("buffers", self.buffer)
        if plan.stage == 2:
            self._into_bucket(kind, size)
            return
        if self.widens:
            ledger.hold(kind, size * self.element)
            ledger.drop(kind, size * plan.weight)
        if self.filled:
            ledger.drop(kind, size * self.element)
        else:
            self.whole.append((kind, size))

    def _into_bucket(self, kind: Kind, size: int) -> None:
        if self.in_bucket + size > self.plan.bucket:
            self._reduce()
        if self.plan.contiguous and size <= self.plan.bucket:
            self.ledger.drop(kind, size * self.element)
        else:
            self.unbuffered.append((kind, size))
        self.in_bucket += size

    def _reduce(self) -> None:
        """Flattened into a copy where it holds pieces of several processes, and cast where it travels otherwise."""
        plan = self.plan
        copied = plan.data > 1 or self.compact
        cast = plan.reduced if plan.reduced != self.element else 0
        self.ledger.touch("buffers", self.in_bucket * ((self.element if copied else 0) + cast))
        self.in_bucket = 0
        if not self.kept:
            self.kept = self._partition_bytes()
            self.ledger.hold("gradients", self.kept)
        if plan.stage == 2:
            self._drop_unbuffered()

    def _drop_unbuffered(self) -> None:
        for kind, size in self.unbuffered:
            self.ledger.drop(kind, size * self.element)
        self.unbuffered = []

    def _partition_bytes(self) -> int:
        """Gradients of this process's partition: of just that in fp32, or of all parameters it has any of."""
        if self.plan.offloads and not self.compact:
            return 0
        if self.compact:
            return sum(part.size for part in self.parts.values()) * FP32
        return sum(part.whole for part in self.parts.values()) * self.element

    def backward_done(self, last: bool) -> None:
        ledger, plan = self.ledger, self.plan
        self.filled = True
        if plan.stage == 1 and not last:
            return
        if plan.stage == 1:
            second = plan.bucket * self.element if self.pipelined and plan.contiguous else 0
            with ledger.meanwhile("buffers", second):
                for kind, size in self.whole:
                    self._into_bucket(kind, size)
                self._reduce()
            self.whole = []
        else:
            self._reduce()
        self._drop_unbuffered()
        ledger.drop("buffers", self.buffer)
        self.buffer = 0
        if plan.stage == 2 and not self.compact:
            if self.carried:  # added to what earlier micro-batches left
                ledger.drop("gradients", self.kept)
            self.carried, self.kept = max(self.kept, self.carried), 0

    def step(self) -> None:
        ledger, kept = self.ledger, self.kept or self.carried
        ledger.touch("buffers", NORM * max(part.largest for part in self.parts.values()))
        if self.compact or self.plan.offloads:
            ledger.drop("gradients", kept)
        else:
            for part in self.parts.values():  # one group after the other, each flattened into a copy
                ledger.touch("gradients", part.size * (FP32 if self.element == FP32 else FP32 + self.element))
            ledger.drop("gradients", kept)
        self.kept = self.carried = 0
        self.filled = False


class ZeroThree(_Groups):
    """DeepSpeed's DeepSpeedZeroOptimizer_Stage3."""

    def resident(self) -> None:
        plan = self.plan
        self.shards = {n: sum(-(-size // plan.data) for size in numels) for n, numels in self.groups.items()}
        budget = plan.persists_in_all
        for name, numels, is_scale in self.kinds():
            self.hold("host" if plan.offloads_weights else "weights", is_scale, self.shards[name] * plan.weight)
            self.hold("host" if plan.offloads else "gradients", is_scale, self.shards[name] * plan.accumulated)
            self.hold_states(is_scale, self.shards[name])
            small = [size for size in numels if size <= plan.persists_up_to]
            whole = min(sum(small), max(budget, 0)) if plan.data > 1 else 0
            budget -= whole
            self.hold("weights", is_scale, whole * plan.weight)
        self.ledger.hold("buffers", plan.bucket * plan.reduced if plan.contiguous else 0)
        self.sizes = [matrix.numel for matrix in self.share.matrices()]
        self.gathering = Gathering(trace_of(self.share, recompute=self.recompute), self.sizes, plan)
        self.bucketed: list[int] = []
        self.unbuffered: list[tuple[Kind, int]] = []

    def fetch(self, tensor: int) -> None:
        """What is gathered ahead arrives in one buffer, from which each is copied. One process has nothing to gather
        (`runtime/zero/partition_parameters.py`, `NoGatherHandle`)."""
        if self.plan.data > 1:
            now, ahead = self.gathering.use(tensor)
            self.ledger.hold("weights", sum(self.sizes[found] for found in (*now, *ahead)) * self.plan.weight)
            self.ledger.touch(
                "buffers", min(sum(map(self.sizes.__getitem__, ahead)), self.plan.prefetch) * self.plan.weight
            )

    def release(self, tensor: int) -> None:
        tied = self.share.tied_here and tensor == 0
        if self.plan.data > 1 and not tied and self.gathering.done(tensor):
            self.ledger.drop("weights", self.sizes[tensor] * self.plan.weight)

    def arrived(self, kind: Kind, size: int) -> None:
        if self.bucketed and sum(self.bucketed) + size > self.plan.bucket:
            self._reduce()
        self.bucketed.append(size)
        if self.plan.contiguous and size <= self.plan.bucket:
            self.ledger.drop(kind, size * self.plan.weight)
        else:
            self.unbuffered.append((kind, size))

    def _reduce(self) -> None:
        """Reduce-scattered from a copy that sorts the pieces by process; one parameter that divides needs none."""
        plan = self.plan
        cast = sum(size for _, size in self.unbuffered) * (plan.reduced if plan.reduced != plan.weight else 0)
        sorts = len(self.bucketed) > 1 or self.bucketed[0] % plan.data
        self.ledger.touch("buffers", cast + (sum(self.bucketed) * plan.reduced if sorts else 0))
        for kind, size in self.unbuffered:
            self.ledger.drop(kind, size * plan.weight)
        self.bucketed, self.unbuffered = [], []

    def backward_done(self, last: bool) -> None:  # noqa: ARG002 - every micro-batch is alike
        if self.bucketed:
            self._reduce()
        for tensor in self.gathering.live:
            self.ledger.drop("weights", self.sizes[tensor] * self.plan.weight)
        self.gathering.start()

    def step(self) -> None:
        if not self.plan.offloads:
            largest = max(size for numels in self.groups.values() for size in numels)
            self.ledger.touch("buffers", NORM * -(-largest // self.plan.data))
            for shard in self.shards.values():  # flattened into a copy, a sub-group at a time
                self.ledger.touch("gradients", min(shard, self.plan.sub_group) * FP32)


def zero_of(
    ledger: Ledger, share: Share, plan: ZeroPlan, *, recompute: bool, pipelined: bool
) -> Bf16ZeroOne | ZeroOneTwo | ZeroThree:
    """The optimizer that DeepSpeed takes for these settings."""
    kind = ZeroThree if plan.stage == 3 else Bf16ZeroOne if plan.keeps_fp32_gradients else ZeroOneTwo
    return kind(ledger, share, plan, recompute=recompute, pipelined=pipelined)
