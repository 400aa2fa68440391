"""Tensor parallelism as in Megatron-LM (arXiv 1909.08053): what a process holds of a matrix, and what it exchanges.

Weights that make channels (q, k, v, gate, up, the head) are split by rows, weights that mix them (o, down) by columns,
and the embedding by vocabulary. Between the two only element-wise arithmetic happens, so that a block exchanges
activations twice: `enter` before the row-split matrices (the paper's f) and `leave` after the column-split ones (its
g). With `sequence` the residual stream and the norms between `leave` and `enter` are split along the sequence
(arXiv 2205.05198): the all-reduces become a reduce-scatter and an all-gather of the same volume.

The matrices themselves stay plain `nn.Linear` and `nn.Embedding` of the local size; their weights carry a `Shard`.

Sizes in comments: b = sequences, t = tokens of a sequence, D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

Layer = TypeVar("Layer", nn.Linear, nn.Embedding)


@dataclass(frozen=True)
class TensorParallel:
    """The processes that share every matrix, and this one's place among them."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence: bool = False
    """Whether the residual stream is split along the sequence."""

    def enter(self, x: Tensor) -> Tensor:
        """Into a parallel region: [b, t, D] on every process; under `sequence` from its share [b, t/size, D]."""
        if self.size == 1:
            return x
        return _apply(_GatherSequence if self.sequence else _SumGradient, x, self)

    def leave(self, x: Tensor) -> Tensor:
        """Out of a parallel region: the sum of the partial [b, t, D] of all processes, or this one's share of it."""
        if self.size == 1:
            return x
        return _apply(_ScatterSequence if self.sequence else _Sum, x, self)

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that is the same on all processes, of which each sees a part of the gradient."""
        return parameter if self.size == 1 else _apply(_SumGradient, parameter, self)

    def shard(self, dim: int, full: int) -> Shard:
        """This process's part of a dimension; sizes that do not divide are padded on the last ones."""
        local = -(-full // self.size)
        start = min(self.rank * local, full)
        return Shard(self, dim, start, min(local, full - start), local, full)

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """In place."""
        if self.size > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def __repr__(self) -> str:
        return f"TensorParallel(rank={self.rank}, size={self.size}, sequence={self.sequence})"


ALONE = TensorParallel()


def _apply(exchange: type[torch.autograd.Function], x: Tensor, parallel: TensorParallel) -> Tensor:
    return exchange.apply(x, parallel)


def keep_out_of_graphs() -> None:
    """From now on torch.compile ends a graph before an exchange and begins another behind it. (Not from the start:
    to say so imports the compiler.)"""
    global _apply
    _apply = torch.compiler.disable(_apply)


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that a process holds: `size` rows (dim 0) or columns (dim 1) from `start`, of `full`.

    `local` is what the tensor has, padding included. Attached to the parameter as its attribute `shard`.
    """

    parallel: TensorParallel
    dim: int
    start: int
    size: int
    local: int
    full: int

    def full_shape(self, local: torch.Size) -> torch.Size:
        return torch.Size([*local[: self.dim], self.full, *local[self.dim + 1 :]])

    def take(self, whole: Tensor) -> Tensor:
        """This process's part of a whole parameter, padded with zeros."""
        part = whole.narrow(self.dim, self.start, self.size)
        if self.size == self.local:
            return part
        padding = [0, 0] * (whole.ndim - 1 - self.dim) + [0, self.local - self.size]
        return F.pad(part, padding)

    def whole(self, local: Tensor) -> Tensor:
        """The whole parameter, from all parts, without gradient. Collective."""
        out = local.new_zeros(self.full_shape(local.shape))
        out.narrow(self.dim, self.start, self.size).copy_(local.detach().narrow(self.dim, 0, self.size))
        return self.parallel.all_reduce(out)  # every element is held by one process: a sum with zeros is exact


def shard_of(parameter: Tensor) -> Shard | None:
    """None for a parameter that every process holds whole."""
    return getattr(parameter, "shard", None)


def mark(parameter: Tensor, shard: Shard) -> None:
    """Attach a shard, also in the way that DeepSpeed's gradient norm knows: each part counts, a copy counts once."""
    parameter.shard = shard  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def column_parallel_linear(inputs: int, outputs: int, parallel: TensorParallel) -> nn.Linear:
    """A Linear that makes this process's share of the output channels: its weight is split by rows."""
    shard = parallel.shard(0, outputs)
    return _marked(nn.Linear(inputs, shard.local, bias=False), shard)


def row_parallel_linear(inputs: int, outputs: int, parallel: TensorParallel) -> nn.Linear:
    """A Linear that takes this process's share of the input channels and gives a partial sum of all outputs."""
    shard = parallel.shard(1, inputs)
    assert shard.local * parallel.size == inputs, f"{inputs} input channels on {parallel.size} processes"
    return _marked(nn.Linear(shard.local, outputs, bias=False), shard)


def vocabulary_parallel_embedding(vocabulary: int, width: int, parallel: TensorParallel) -> nn.Embedding:
    """The table's rows of this process's share of the vocabulary; `look_up` reads it."""
    shard = parallel.shard(0, vocabulary)
    return _marked(nn.Embedding(shard.local, width), shard)


def _marked(module: Layer, shard: Shard) -> Layer:
    if shard.parallel.size > 1:
        mark(module.weight, shard)
    return module


def look_up(table: nn.Embedding, tokens: Tensor, parallel: TensorParallel, vocabulary: int) -> Tensor:
    """Rows of tokens [b, t], partial: zeros where another process has the row. Follow it with `leave`."""
    if parallel.size == 1:
        return table(tokens)
    shard = parallel.shard(0, vocabulary)
    local = tokens - shard.start
    elsewhere = (local < 0) | (local >= shard.size)
    return table(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0.0)


class _SumGradient(torch.autograd.Function):
    """Forward: as it is. Backward: the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.parallel.all_reduce(grads[0].clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    """Forward: the sum of all processes' x. Backward: as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:  # noqa: ARG004 - autograd's signature
        return parallel.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    """Forward: [b, t/size, D] of all processes to [b, t, D]. Backward: this process's share of the summed gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return _gather(x, parallel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter(grads[0], ctx.parallel), None


class _ScatterSequence(torch.autograd.Function):
    """Forward: this process's share [b, t/size, D] of the sum of all [b, t, D]. Backward: gather the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: TensorParallel) -> Tensor:
        ctx.parallel = parallel
        return _scatter(x, parallel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.parallel), None


def _gather(x: Tensor, parallel: TensorParallel) -> Tensor:
    mine = x.transpose(0, 1).contiguous()  # collectives join and cut the first dimension
    out = mine.new_empty((parallel.size * mine.shape[0], *mine.shape[1:]))
    dist.all_gather_into_tensor(out, mine, group=parallel.group)
    # contiguous: else each of the matrices that take it would make, and keep for backward, a copy of its own
    return out.transpose(0, 1).contiguous()


def _scatter(x: Tensor, parallel: TensorParallel) -> Tensor:
    everyone = x.transpose(0, 1).contiguous()
    out = everyone.new_empty((everyone.shape[0] // parallel.size, *everyone.shape[1:]))
    dist.reduce_scatter_tensor(out, everyone, group=parallel.group)
    return out.transpose(0, 1)
