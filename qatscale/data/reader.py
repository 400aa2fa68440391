"""Token shards as one long stream, and batches as a pure function of (seed, step, rank).

Sequence i of a stream is the T + 1 tokens [i T, i T + T]: T inputs and, shifted by one, T labels. T is chosen when
training starts, and neighbouring sequences share one token.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qatscale.data.indexed import IndexedReader, Shard
from qatscale.data.manifest import Manifest, Split, Verify
from qatscale.data.mixture import ONE_SOURCE, Mixture
from qatscale.errors import UserError

BLOCK = 1024
"""Positions of an order that are drawn at once: a small batch's 16 cost as much as these."""
MAPS = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] % (1 << 63) // 4)  # no limit is -1
"""Shards that a process keeps open, over all its streams; a descriptor each."""


class TokenStream:
    """The tokens of a split, shard after shard, each memory-mapped when it is first read."""

    def __init__(
        self, manifest: Manifest, shards: Sequence[Shard], open_shard: Callable[[Shard], IndexedReader], name: str
    ) -> None:
        """`open_shard`: gives the file that holds a shard. `name`: what errors call the stream."""
        self.manifest, self.name, self.open_shard = manifest, name, open_shard
        self._shards, self.files = shards, {shard.name: shard for shard in shards}
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))

    @classmethod
    def open(cls, folder: Path, split: Split, verify: Verify = "auto", manifest: Manifest | None = None) -> TokenStream:
        """Raises UserError for a missing folder or split and for a missing, truncated or altered shard.

        manifest: the folder's, where it is known.
        """
        manifest = manifest or Manifest.load(folder)
        manifest.check_shards(folder, split, verify)
        open_shard = functools.partial(manifest.open_shard, folder)
        return cls(manifest, manifest.splits[split].shards, open_shard, f"{folder} ({split})")

    def __len__(self) -> int:
        """Tokens."""
        return self._ends[-1]

    def _locate(self, position: int) -> tuple[int, int]:
        """(shard, offset within it) of a token."""
        shard = bisect.bisect_right(self._ends, position)
        return shard, position - (self._ends[shard - 1] if shard else 0)

    def _read(self, shard: int, offset: int, out: np.ndarray) -> None:
        filled = 0
        while filled < len(out):
            held = self._shards[shard]
            first, end = held.start + offset, held.start + min(held.tokens, offset + len(out) - filled)
            part = _opened(self, held.name).tokens[first:end]
            out[filled : filled + len(part)] = part
            filled, shard, offset = filled + len(part), shard + 1, 0

    def sequences(self, sequence_length: int) -> int:
        """Complete sequences of `sequence_length` inputs. Raises UserError if there are none."""
        return complete_sequences(self.name, len(self), sequence_length)

    def gather(self, indices: np.ndarray, sequence_length: int) -> np.ndarray:
        """Sequences `indices` [n] as int64 [n, sequence_length + 1]."""
        out = np.empty((len(indices), sequence_length + 1), np.int64)
        places = [self._locate(index * sequence_length) for index in indices.tolist()]
        for shard, offset in places:  # all before the first is read, so that a disk serves them together
            held = self._shards[shard]
            _opened(self, held.name).prefetch(held.start + offset, sequence_length + 1)
        for row, place in zip(out, places, strict=True):
            self._read(*place, row)
        return out


def complete_sequences(name: str, tokens: int, sequence_length: int) -> int:
    """Sequences of `sequence_length` inputs in so many tokens. UserError if there are none."""
    count = (tokens - 1) // sequence_length
    if count < 1:
        problem = f"{name} has {tokens} tokens, and one sequence takes {sequence_length + 1}."
        fix = "Choose a shorter one or prepare more text."
        raise UserError("data.sequence_length", sequence_length, problem, fix)
    return count


@functools.lru_cache(maxsize=MAPS)
def _opened(stream: TokenStream, name: str) -> IndexedReader:
    return stream.open_shard(stream.files[name])


class ShuffledOrder:
    """A pseudo-random permutation of n sequences for every (seed, epoch).

    A Feistel network on a square grid of at least n cells: a round shifts each column by a random number of rows, then
    each row by a random number of columns. A cell beyond n is permuted again until it is below n, which leaves a
    permutation of n ("cycle walking", Black and Rogaway 2002). So any position is found without the ones before it,
    from tables of about 8 sqrt(n) numbers: 2 MB for a billion sequences.

    The shifts come from Philox, whose raw stream NumPy guarantees (its `permutation` may change).
    """

    _ROUNDS = 4
    """With 3, the orders of a dozen sequences are measurably not all equally likely; with 4 they are."""

    def __init__(self, sequences: int, seed: int) -> None:
        self._n, self._seed = sequences, seed % 2**64
        self._side = max(4, math.isqrt(sequences - 1) + 1)  # a smaller grid has too few shifts to mix
        self._shifts = functools.lru_cache(maxsize=2)(self._draw_shifts)
        self._size = size = min(BLOCK, sequences)
        self._block = functools.lru_cache(maxsize=1)(lambda block: self._draw(block * size, size))

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Sequence at each of the positions [first, first + count), counted through all epochs; int64 [count]."""
        block, place = divmod(first, self._size)
        within = place + count <= self._size
        return self._block(block)[place : place + count] if within else self._draw(first, count)

    def _draw(self, first: int, count: int) -> np.ndarray:
        parts = []
        while count:
            epoch, place = divmod(first, self._n)
            taken = min(count, self._n - place)
            parts.append(self.in_epoch(epoch, np.arange(place, place + taken)))
            first, count = first + taken, count - taken
        return np.concatenate(parts)

    def in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Sequence at each of these places of an epoch, in any order; int64 [places]."""
        places = self._permute(epoch, places)
        while (beyond := places >= self._n).any():
            places[beyond] = self._permute(epoch, places[beyond])
        return places

    def _permute(self, epoch: int, cells: np.ndarray) -> np.ndarray:
        row, column = np.divmod(cells, self._side)
        for down, right in self._shifts(epoch):
            row = (row + down[column]) % self._side
            column = (column + right[row]) % self._side
        return row * self._side + column

    def _draw_shifts(self, epoch: int) -> np.ndarray:
        """int64 [rounds, 2, side], each in [0, side)."""
        bits = np.random.Philox(key=np.array([self._seed, epoch], np.uint64)).random_raw(self._ROUNDS * 2 * self._side)
        return (bits % np.uint64(self._side)).astype(np.int64).reshape(self._ROUNDS, 2, self._side)


class ReshuffledTail:
    """An order that is another one up to the position `start`, and from there on shuffled anew: first what that epoch
    has left, so that nothing repeats within it, then all sequences again."""

    def __init__(self, order: ShuffledOrder, sequences: int, start: int, seed: int) -> None:
        """`sequences`: those of an epoch."""
        self._order, self._start = order, start
        self._epoch, self._place = divmod(start, sequences)
        self._rest = sequences - self._place
        self._within = ShuffledOrder(self._rest, seed)
        self._after = ShuffledOrder(sequences, seed + 1)

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Sequence at each of the positions [first, first + count); int64 [count]."""
        end, turn = first + count, self._start + self._rest
        parts = []
        if first < self._start:
            parts.append(self._order(first, min(end, self._start) - first))
        if (begin := max(first, self._start)) < min(end, turn):
            shuffled = self._within(begin - self._start, min(end, turn) - begin)
            parts.append(self._order.in_epoch(self._epoch, self._place + shuffled))
        if (begin := max(first, turn)) < end:
            parts.append(self._after(begin - turn, end - begin))
        return np.concatenate(parts)


class BatchReader:
    """Training batches: a pure function of (seed, step, rank). The global batch is the same for any number of ranks.

    The mixture decides each position's source. Every source has an order of its own, of which it reads the next
    sequence; the order depends on the source's name and on no other source. Consecutive steps read a random sample,
    without replacement within an epoch, of each entire stream: the order of documents does not bias a short run.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        sequence_length: int,
        sequences: int,
        seed: int,
        tail: tuple[int, int] | None = None,
        mixture: Mixture = ONE_SOURCE,
        manifest: Manifest | None = None,
    ) -> None:
        """streams: by the mixture's names. `sequences`: those of the global batch. `tail`: (step, seed) from which the
        orders are others. manifest: of all sources; None = that of the only one. UserError where a stream is shorter
        than a sequence, or the only one cannot fill one batch."""
        self.sequence_length, self.sequences, self.mixture = sequence_length, sequences, mixture
        self.manifest = manifest or streams[mixture.names[0]].manifest
        self.held = {name: streams[name].manifest.splits["train"].tokens for name in mixture.names}
        """Training tokens by source."""
        self._sources: list[tuple[TokenStream, Callable[[int, int], np.ndarray]]] = []
        for source, name in enumerate(mixture.names):
            stream, own_seed = streams[name], seed
            epoch = stream.sequences(sequence_length)
            if name:
                own_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")
            elif sequences > epoch:
                problem = f"{stream.name} holds {epoch} sequences of {sequence_length} tokens."
                raise UserError("batch.sequences", sequences, problem, "Choose a smaller batch or prepare more text.")
            order = ShuffledOrder(epoch, own_seed)
            if tail is None:
                self._sources.append((stream, order))
            else:
                start = int(mixture.count(tail[0] * sequences)[source])
                self._sources.append((stream, ReshuffledTail(order, epoch, start, own_seed + (tail[1] << 32))))

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
        """Rank's part of the batch of 0-based `step`: int64 [sequences / ranks, sequence_length + 1]."""
        if self.sequences % ranks:
            problem = f"cannot be divided among {ranks} data-parallel processes."
            raise UserError("batch.sequences", self.sequences, problem)
        assert 0 <= rank < ranks
        count = self.sequences // ranks
        first = step * self.sequences + rank * count
        if len(self._sources) == 1:
            [(stream, order)] = self._sources
            return stream.gather(order(first, count), self.sequence_length)
        sources, done = self.mixture.sources(first, count), self.mixture.count(first)
        out = np.empty((count, self.sequence_length + 1), np.int64)
        for source, (stream, order) in enumerate(self._sources):
            rows = np.flatnonzero(sources == source)
            if len(rows):
                out[rows] = stream.gather(order(int(done[source]), len(rows)), self.sequence_length)
        return out

    def tokens(self, first: int, end: int, left_out: Sequence[int] = ()) -> dict[str, int]:
        """By source the tokens of the batches [first, end) without those left out."""
        counts = self._count(first, end)
        for batch in left_out:
            if first <= batch < end:
                counts -= self._count(batch, batch + 1)
        return dict(zip(self.mixture.names, (counts * self.sequence_length).tolist(), strict=True))

    def _count(self, first: int, end: int) -> np.ndarray:
        return self.mixture.count(end * self.sequences) - self.mixture.count(first * self.sequences)


class EvaluationBatch(NamedTuple):
    tokens: np.ndarray
    """int64 [rows, sequence_length + 1], rows <= micro_batch."""
    weight: int
    """Sequences that count: rows, or 0 for a filler that keeps the ranks' numbers of forward passes equal."""


class EvaluationReader:
    """Sequences spread evenly over a split, the same ones for every run and every number of ranks.

    The split is cut into equal parts, and a fixed draw takes one sequence of each. (Equal distances would be biased in
    a split whose documents alternate at that distance.)

    The sequences are cut into micro-batches; the last may be smaller. Rank i mod ranks evaluates micro-batch i. A rank
    with one fewer gets a filler of weight 0, because a sharded model's forward pass needs all ranks. The exact mean
    over tokens is sum(weight x mean loss) / sum(weight), both sums over all ranks.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, tokens: int, micro_batch: int) -> None:
        """`tokens`: the most to use, rounded down to sequences, at least one.

        Raises UserError where the stream is shorter than a sequence.
        """
        self.stream, self.sequence_length, self.micro_batch = stream, sequence_length, micro_batch
        available = stream.sequences(sequence_length)
        self.sequences = min(max(1, tokens // sequence_length), available)
        bounds = np.arange(self.sequences + 1) * available // self.sequences
        draws = np.random.Philox(key=0).random_raw(self.sequences) % np.diff(bounds).astype(np.uint64)
        self._indices = bounds[:-1] + draws.astype(np.int64)

    @property
    def tokens(self) -> int:
        """Labels in the mean."""
        return self.sequences * self.sequence_length

    def batches(self, rank: int = 0, ranks: int = 1) -> list[EvaluationBatch]:
        """As many on every rank; the weights of all ranks add up to `sequences`."""
        return [self.batch(i, rank, ranks) for i in range(self.batches_per_rank(ranks))]

    def batches_per_rank(self, ranks: int) -> int:
        return -(-self.sequences // (self.micro_batch * ranks))

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> EvaluationBatch:
        first = (index * ranks + rank) * self.micro_batch
        weight = max(0, min(self.micro_batch, self.sequences - first))
        indices = self._indices[first : first + weight] if weight else self._indices[:1]
        return EvaluationBatch(self.stream.gather(indices, self.sequence_length), weight)
