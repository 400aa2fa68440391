"""Token shards as one long stream, and batches as a pure function of (seed, step, rank).

Sequence i of a stream is its tokens [i T, i T + T], T + 1 of them: T inputs and, one further, T labels. So T is chosen
when training starts, and neighbouring sequences share one token.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qatscale.data.manifest import Manifest, Split, Verify
from qatscale.errors import UserError


class TokenStream:
    """The tokens of a split, shard after shard, memory-mapped: any position without a scan."""

    def __init__(self, manifest: Manifest, shards: Sequence[np.ndarray], name: str) -> None:
        """`shards`: the tokens of each, [tokens]; `name`: what an error calls it."""
        self.manifest, self.name = manifest, name
        self._shards = [np.asarray(shard) for shard in shards]  # a slice of a np.memmap costs several times as much
        self._ends = list(itertools.accumulate(map(len, shards)))

    @classmethod
    def open(cls, folder: Path | str, split: Split, verify: Verify = "auto") -> TokenStream:
        """Raises UserError for a missing folder or split and for a missing, truncated or altered shard."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        shards = manifest.open_shards(folder, split, verify)
        return cls(manifest, [shard.tokens for shard in shards], f"{folder} ({split})")

    def __len__(self) -> int:
        """Tokens."""
        return self._ends[-1]

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), int64, across shards."""
        assert 0 <= start <= start + length <= len(self), (start, length, len(self))
        out = np.empty(length, np.int64)
        self._read(start, out)
        return out

    def _read(self, start: int, out: np.ndarray) -> None:
        filled = 0
        shard = bisect.bisect_right(self._ends, start)
        offset = start - (self._ends[shard - 1] if shard else 0)
        while filled < len(out):
            part = self._shards[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled, shard, offset = filled + len(part), shard + 1, 0

    def sequences(self, sequence_length: int) -> int:
        """Whole sequences of `sequence_length` inputs, each with its last label.

        Raises UserError where there is none.
        """
        count = (len(self) - 1) // sequence_length
        if count < 1:
            have = f"{self.name} has {len(self)} tokens, and one sequence takes {sequence_length + 1}."
            raise UserError("data.sequence_length", sequence_length, have, "Choose a shorter one or prepare more text.")
        return count

    def gather(self, indices: np.ndarray, sequence_length: int) -> np.ndarray:
        """Sequences `indices` [n] as int64 [n, sequence_length + 1]."""
        out = np.empty((len(indices), sequence_length + 1), np.int64)
        for row, index in zip(out, indices.tolist(), strict=True):
            self._read(index * sequence_length, row)
        return out


class ShuffledOrder:
    """Every epoch an order of its own over n sequences: blocks are permuted, and sequences within each block.

    Keys come from Philox, whose raw stream NumPy keeps the same for good (its `permutation` may change), counted by
    (seed, epoch, block): any position is found without the ones before it.
    """

    def __init__(self, sequences: int, block: int, seed: int) -> None:
        self._n, self._block, self._seed = sequences, min(block, sequences), seed % 2**64
        self._blocks = -(-sequences // self._block)
        self._last = sequences - (self._blocks - 1) * self._block  # sequences in the last block, maybe fewer
        self._block_order = functools.lru_cache(maxsize=2)(self._draw_block_order)
        self._within = functools.lru_cache(maxsize=2)(self._draw_within)  # an epoch comes to a block once

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Sequence index at each of `positions` [n], which count on through the epochs."""
        epochs, places = np.divmod(positions, self._n)
        out = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._in_epoch(int(epoch), places[here])
        return out

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        order, short = self._block_order(epoch)
        # Behind the short block every place is counted as if that block were full.
        padded = places + np.where(places >= short * self._block + self._last, self._block - self._last, 0)
        slots, offsets = np.divmod(padded, self._block)
        out = np.empty(len(places), np.int64)
        for slot in np.unique(slots).tolist():
            here = slots == slot
            block = int(order[slot])
            out[here] = block * self._block + self._within(epoch, block)[offsets[here]]
        return out

    def _draw_block_order(self, epoch: int) -> tuple[np.ndarray, int]:
        """The blocks in the epoch's order, and the slot that the short last block got."""
        order = self._permutation(epoch, 0, self._blocks)
        return order, int(np.flatnonzero(order == self._blocks - 1)[0])

    def _draw_within(self, epoch: int, block: int) -> np.ndarray:
        size = self._last if block == self._blocks - 1 else self._block
        return self._permutation(epoch, 1 + block, size)

    def _permutation(self, epoch: int, stream: int, size: int) -> np.ndarray:
        counter = np.array([0, 0, stream, 0], np.uint64)
        keys = np.random.Philox(key=np.array([self._seed, epoch], np.uint64), counter=counter).random_raw(size)
        return np.argsort(keys, kind="stable")


class BatchReader:
    """Training batches: a pure function of (seed, step, rank). How many ranks there are changes nobody's sequences."""

    def __init__(
        self, stream: TokenStream, sequence_length: int, sequences: int, seed: int, shuffle_block: int
    ) -> None:
        """`sequences`: of the global batch; `shuffle_block`: see `data.shuffle_block` of the recipe.

        Raises UserError where the stream cannot fill one batch.
        """
        self.stream, self.sequence_length, self.sequences = stream, sequence_length, sequences
        self.sequences_per_epoch = stream.sequences(sequence_length)
        if sequences > self.sequences_per_epoch:
            have = f"{stream.name} holds {self.sequences_per_epoch} sequences of {sequence_length} tokens."
            raise UserError("batch.sequences", sequences, have, "Choose a smaller batch or prepare more text.")
        self._order = ShuffledOrder(self.sequences_per_epoch, shuffle_block, seed)

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
        """Rank's part of the batch of 0-based `step`: int64 [sequences / ranks, sequence_length + 1]."""
        if self.sequences % ranks:
            raise UserError(
                "batch.sequences", self.sequences, f"does not divide among {ranks} data-parallel processes."
            )
        assert 0 <= rank < ranks
        share = self.sequences // ranks
        first = step * self.sequences + rank * share
        return self.stream.gather(self._order(np.arange(first, first + share)), self.sequence_length)

    def epoch(self, step: int) -> float:
        """Epochs read before 0-based `step`."""
        return self.epochs(step)

    def epochs(self, steps: int) -> float:
        """Epochs that `steps` steps read; above 1, data repeat."""
        return steps * self.sequences / self.sequences_per_epoch

    def repetition(self, steps: int) -> str | None:
        """What to warn of before a run of `steps` steps, or None where no sequence comes twice."""
        epochs = self.epochs(steps)
        if epochs <= 1:
            return None
        unique = self.sequences_per_epoch * self.sequence_length
        beyond = "; beyond about 4 epochs repeated tokens are worth little (arXiv:2305.16264)" if epochs > 4 else ""
        return f"the data repeat: {epochs:.2f} epochs of {unique:,} tokens{beyond}"


class EvaluationBatch(NamedTuple):
    tokens: np.ndarray
    """int64 [rows, sequence_length + 1], rows <= micro_batch."""
    weight: int
    """Sequences that count: rows, or 0 for a filler that only keeps the ranks' forward passes equal in number."""


class EvaluationReader:
    """The first sequences of a split, in order, the same ones for every number of ranks.

    They are cut into micro-batches, of which the last may be smaller; none is dropped. Micro-batch i goes to rank
    i mod ranks, and a rank that has one fewer gets a filler of weight 0, because a sharded model's forward pass takes
    all ranks. The exact mean over tokens is sum(weight x mean loss) / sum(weight), both sums over all ranks.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, tokens: int, micro_batch: int) -> None:
        """`tokens`: how many to use at most, rounded down to whole sequences, at least one.

        Raises UserError where the stream is shorter than a sequence.
        """
        self.stream, self.sequence_length, self.micro_batch = stream, sequence_length, micro_batch
        self.sequences = min(max(1, tokens // sequence_length), stream.sequences(sequence_length))

    @property
    def tokens(self) -> int:
        """Labels that the mean is over."""
        return self.sequences * self.sequence_length

    def batches(self, rank: int = 0, ranks: int = 1) -> list[EvaluationBatch]:
        """Equally many on every rank; the weights of all ranks add up to `sequences`."""
        return [self.batch(i, rank, ranks) for i in range(self.batches_per_rank(ranks))]

    def batches_per_rank(self, ranks: int) -> int:
        return -(-self.sequences // (self.micro_batch * ranks))

    def batch(self, index: int, rank: int = 0, ranks: int = 1) -> EvaluationBatch:
        """Batch `index` of a rank; reads only this one."""
        first = (index * ranks + rank) * self.micro_batch
        weight = max(0, min(self.micro_batch, self.sequences - first))
        rows = np.arange(first, first + weight) if weight else np.arange(1)
        return EvaluationBatch(self.stream.gather(rows, self.sequence_length), weight)
