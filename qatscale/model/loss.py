"""The training loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qatscale.model.tensor_parallel import Shard


class _CrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(logits)[label] over the rows; logits: [n, V], labels: [n] → fp32 scalar.

    `F.cross_entropy(logits.float(), labels)` holds an fp32 copy of the logits and their log-probabilities, and its
    backward pass writes a dense [n, V] gradient of the latter with one non-zero a row. Here one fp32 [n, V] tensor, the
    probabilities, lives from forward to backward and becomes the gradient in place: (softmax - one-hot) / n.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        p = torch.softmax(logits, dim=-1, dtype=torch.float32)
        # log Σ exp(logit) = max - log p(max): no second pass of exponentials, and p(max) ≥ 1/V never underflows
        log_sum = logits.amax(dim=-1).float() - p.amax(dim=-1).log()
        labels = labels.unsqueeze(-1)
        ctx.save_for_backward(p, labels)
        ctx.dtype = logits.dtype
        return (log_sum - logits.gather(-1, labels).squeeze(-1).float()).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        p, labels = ctx.saved_tensors  # a second backward raises here: autograd sees that p was overwritten
        p.scatter_add_(-1, labels, p.new_full((), -1.0).expand_as(labels))
        return p.mul_(grads[0] / labels.numel()).to(ctx.dtype), None


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    """As above where each process has the logits [n, size] of its share of the vocabulary; no process has all of them.

    Three numbers a row are exchanged: its largest logit, Σ exp, and the label's logit, which one process knows.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: Shard) -> Tensor:
        wide = logits.float()
        largest = shard.parallel.all_reduce(wide.amax(dim=-1), dist.ReduceOp.MAX)
        local = labels - shard.start
        elsewhere = (local < 0) | (local >= shard.size)
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        p = torch.exp(wide - largest.unsqueeze(-1))
        chosen = wide.gather(-1, local).squeeze(-1) - largest
        sums = shard.parallel.all_reduce(torch.stack((p.sum(dim=-1), chosen.masked_fill(elsewhere, 0.0))))
        p.div_(sums[0].unsqueeze(-1))
        ctx.save_for_backward(p, local, elsewhere)
        ctx.dtype = logits.dtype
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        p, local, elsewhere = ctx.saved_tensors
        p.scatter_add_(-1, local, elsewhere.to(p.dtype).sub_(1.0).unsqueeze(-1))
        return p.mul_(grads[0] / local.numel()).to(ctx.dtype), None, None


def cross_entropy(logits: Tensor, labels: Tensor, shard: Shard | None = None) -> Tensor:
    """Mean cross-entropy in nats over all positions, in fp32. logits: [b, t, V], labels: [b, t].

    shard: the rows of the vocabulary that the logits are of, where every process has some; padding is left out.
    """
    labels = labels.flatten()
    if shard is None or shard.parallel.size == 1:
        return _CrossEntropy.apply(logits.flatten(0, -2), labels)
    return _VocabularyParallelCrossEntropy.apply(logits[..., : shard.size].flatten(0, -2), labels, shard)
