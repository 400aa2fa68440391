"""Tensor parallelism as in Megatron-LM (arXiv 1909.08053): each process's part of a matrix, and the exchanges.

Weights that make channels (q, k, v, gate, up, the head) are split by rows, those that mix them (o, down) by columns,
and the embedding by vocabulary. Between the two kinds the arithmetic is element-wise, so a block exchanges activations
in two places: `enter` before the row-split matrices (the paper's f) and `leave` after the column-split ones (its g).
With `sequence`, the residual stream and the norms between `leave` and `enter` are split along the sequence
(arXiv 2205.05198). The all-reduces then become a reduce-scatter and an all-gather of the same volume.

The matrices stay plain `nn.Linear` and `nn.Embedding` modules of the local size; their weights carry a `Shard`.

Sizes in comments: b = sequences, t = tokens of a sequence, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

Layer = TypeVar("Layer", nn.Linear, nn.Embedding)
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TensorParallel:
    """The processes that share every matrix, and this process's rank among them."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    sequence: bool = False
    """Whether the residual stream is split along the sequence."""

    def enter(self, x: Tensor) -> Tensor:
        """Into a parallel region: [b, t, D] on every process; under `sequence` from its share [b, t/size, D]."""
        if self.size == 1:
            return x
        return _apply(x, self._gather, self._scatter) if self.sequence else self.shared(x)

    def leave(self, x: Tensor) -> Tensor:
        """Out of a parallel region: the sum of the partial [b, t, D] of all processes, or this one's share of it."""
        if self.size == 1:
            return x
        return _apply(x, self._scatter, self._gather) if self.sequence else _apply(x, self._sum, _identity)

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that all processes hold alike, where each has a part of its gradient."""
        return parameter if self.size == 1 else _apply(parameter, _identity, self._sum)

    def shard(self, dim: int, full: int) -> Shard:
        """This process's part of a dimension. A size that does not divide is padded on the last processes."""
        local = -(-full // self.size)
        start = min(self.rank * local, full)
        return Shard(self, dim, start, min(local, full - start), local, full)

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce x in place over the processes; returns x."""
        if self.size > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def _sum(self, x: Tensor) -> Tensor:
        return self.all_reduce(x.clone(memory_format=torch.contiguous_format))

    def _gather(self, x: Tensor) -> Tensor:
        """[b, t/size, D] of all processes → [b, t, D]."""
        mine = x.transpose(0, 1).contiguous()  # collectives concatenate and split the first dimension
        out = mine.new_empty((self.size * mine.shape[0], *mine.shape[1:]))
        dist.all_gather_into_tensor(out, mine, group=self.group)
        # contiguous: else each matrix that takes it would make a copy of its own and keep it for backward
        return out.transpose(0, 1).contiguous()

    def _scatter(self, x: Tensor) -> Tensor:
        """This process's share [b, t/size, D] of the sum of all [b, t, D]."""
        everyone = x.transpose(0, 1).contiguous()
        out = everyone.new_empty((everyone.shape[0] // self.size, *everyone.shape[1:]))
        dist.reduce_scatter_tensor(out, everyone, group=self.group)
        return out.transpose(0, 1)


UNSPLIT = TensorParallel()
"""Every process holds full matrices."""


def _apply(x: Tensor, forward: Map, backward: Map) -> Tensor:
    return _Exchange.apply(x, forward, backward)


def keep_out_of_graphs() -> None:
    """From now on torch.compile ends a graph before each exchange. (Not at import: it would load the compiler.)"""
    global _apply
    _apply = torch.compiler.disable(_apply)


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that a process holds: `size` rows (dim 0) or columns (dim 1) from `start`, of `full`.

    `local` is the tensor's own size, including padding. A shard is the parameter's attribute `shard`.
    """

    parallel: TensorParallel
    dim: int
    start: int
    size: int
    local: int
    full: int

    def full_shape(self, local: torch.Size) -> torch.Size:
        return torch.Size([*local[: self.dim], self.full, *local[self.dim + 1 :]])

    def take(self, full: Tensor) -> Tensor:
        """This process's part of a full parameter, padded with zeros."""
        part = full.narrow(self.dim, self.start, self.size)
        if self.size == self.local:
            return part
        padding = [0, 0] * (full.ndim - 1 - self.dim) + [0, self.local - self.size]
        return F.pad(part, padding)

    def gather(self, local: Tensor) -> Tensor:
        """The full parameter from all parts, without gradient. Collective."""
        out = local.new_zeros(self.full_shape(local.shape))
        out.narrow(self.dim, self.start, self.size).copy_(local.detach().narrow(self.dim, 0, self.size))
        return self.parallel.all_reduce(out)  # exact: each element is one process's value plus zeros


def shard_of(parameter: Tensor) -> Shard | None:
    """The shard that a parameter is; None where every process holds the full parameter."""
    return getattr(parameter, "shard", None)


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the full parameter, of which this process may hold a part."""
    shard = shard_of(parameter)
    return parameter.shape if shard is None else shard.full_shape(parameter.shape)


def mark(parameter: Tensor, shard: Shard) -> None:
    """Attach a shard to its parameter, and mark it so that DeepSpeed's gradient norm counts every process's part."""
    parameter.shard = shard  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def column_parallel_linear(inputs: int, outputs: int, parallel: TensorParallel, bias: bool = False) -> nn.Linear:
    """A Linear that makes this process's share of the output channels: its weight is split by rows."""
    shard = parallel.shard(0, outputs)
    return _marked(nn.Linear(inputs, shard.local, bias=bias), shard)


def row_parallel_linear(inputs: int, outputs: int, parallel: TensorParallel) -> nn.Linear:
    """A Linear that takes this process's share of the input channels and gives a partial sum of all outputs."""
    shard = parallel.shard(1, inputs)
    assert shard.local * parallel.size == inputs, f"{inputs} input channels on {parallel.size} processes"
    return _marked(nn.Linear(shard.local, outputs, bias=False), shard)


def vocabulary_parallel_embedding(vocabulary: int, hidden_size: int, parallel: TensorParallel) -> nn.Embedding:
    """The embedding rows of this process's share of the vocabulary; `look_up` reads them."""
    shard = parallel.shard(0, vocabulary)
    # `nn.Embedding(…)` would draw values, for which the meta device first imports torch's decompositions: 1.4 s
    return _marked(nn.Embedding.from_pretrained(torch.empty(shard.local, hidden_size), freeze=False), shard)


def _marked(module: Layer, shard: Shard) -> Layer:
    if shard.parallel.size > 1:
        for parameter in module.parameters():
            mark(parameter, shard)
    return module


def look_up(table: nn.Embedding, tokens: Tensor, parallel: TensorParallel, vocabulary: int) -> Tensor:
    """The rows [b, t, D] of tokens [b, t], with zeros where another process has the row. `leave` sums them."""
    if parallel.size == 1:
        return table(tokens)
    shard = parallel.shard(0, vocabulary)
    local = tokens - shard.start
    elsewhere = (local < 0) | (local >= shard.size)
    return table(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0.0)


class _Exchange(torch.autograd.Function):
    """A map of x in forward and its adjoint, which maps the gradient, in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Map, backward: Map) -> Tensor:
        ctx.adjoint = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grads[0]), None, None


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)
