"""The output layer and the training loss: the cross-entropy of its logits, in chunks, so that memory never holds all
logits.

Sizes in comments: n = tokens of a micro-batch, c = tokens of a chunk, V = vocabulary (under tensor parallelism a
process's share), D = hidden size. `F.cross_entropy(head(x).float(), labels)` holds three fp32 tensors [n, V]: 4 GB each
for 32,768 tokens and a vocabulary of 32,000. Here each chunk of tokens passes the product with the weight, the softmax
and the two products of the gradient, all in the forward pass. The arithmetic is the same, and nothing is computed
twice. The forward pass saves the gradients of x [n, D] and of the weight [V, D]; the backward pass multiplies them by
the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from qatscale.model.chunks import chunk_rows
from qatscale.model.tensor_parallel import Shard, TensorParallel, mark

ChunkLoss = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(logits [c, V], labels [c], s) → (sum of the losses, fp32 scalar; s · its gradient [c, V] in the logits' type). The
logits may be overwritten."""


def chunk_loss(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`ChunkLoss`, one operation after the other; fp32 logits become their gradient in place."""
    labels = labels.unsqueeze(-1)
    chosen, largest = logits.gather(-1, labels).float().squeeze(-1), logits.amax(dim=-1).float()
    in_place = logits if logits.dtype == torch.float32 else None
    p = torch.softmax(logits, dim=-1, dtype=torch.float32, out=in_place)
    # log Σ exp(logit) = max - log p(max): no second pass of exponentials, and p(max) ≥ 1/V never underflows
    loss = (largest - p.amax(dim=-1).log() - chosen).sum()
    p.scatter_add_(-1, labels, p.new_full((), -1.0).expand_as(labels))
    return loss, p.mul_(scale).to(logits.dtype)


def fusible_chunk_loss(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`ChunkLoss` in a form of which torch.compile makes two kernels, neither of which keeps an fp32 tensor.

    The first reads the logits for log Σ exp; the second reads them again and writes their gradient.
    """
    wide = logits.float()
    log_sum = wide.logsumexp(dim=-1)
    loss = (log_sum - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).float()).sum()
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    p = (wide - log_sum.unsqueeze(-1)).exp()
    return loss, ((p - is_label.float()) * scale).to(logits.dtype)


def _parallel_chunk_loss(shard: Shard) -> ChunkLoss:
    """`ChunkLoss` where each process has the logits of its share of the vocabulary.

    The processes exchange three numbers per row: its largest logit, Σ exp, and the label's logit, which one has.
    """

    def loss_of(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        wide = logits.float()
        largest = shard.parallel.all_reduce(wide.amax(dim=-1), dist.ReduceOp.MAX)
        local = labels - shard.start
        elsewhere = (local < 0) | (local >= shard.size)
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        chosen = wide.gather(-1, local).squeeze(-1) - largest
        p = wide.sub_(largest.unsqueeze(-1)).exp_()
        sums = shard.parallel.all_reduce(torch.stack((p.sum(dim=-1), chosen.masked_fill(elsewhere, 0.0))))
        p.div_(sums[0].unsqueeze(-1))
        p.scatter_add_(-1, local, elsewhere.to(p.dtype).sub_(1.0).unsqueeze(-1))
        return (sums[0].log() - sums[1]).sum(), p.mul_(scale).to(logits.dtype)

    return loss_of


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, shard: Shard | None = None, chunk: ChunkLoss = chunk_loss
) -> Tensor:
    """Mean cross-entropy in nats of the logits x·weightᵀ, an fp32 scalar. x: [..., D], weight: [V, D], labels: [...].

    shard: the rows of the vocabulary that `weight` holds, where every process holds some; padding is left out.
    chunk: how the loss of a chunk is computed; not used where the vocabulary is divided.
    """
    if not torch.is_grad_enabled():  # else the Function would make gradients for parameters that require one
        x, weight = x.detach(), weight.detach()
    if shard is not None and shard.parallel.size > 1:
        chunk = _parallel_chunk_loss(shard)
    vocabulary = len(weight) if shard is None else shard.size
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, labels.flatten(), vocabulary, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, vocabulary: int, chunk: ChunkLoss) -> Tensor:
        """x: [n, D], weight: [V or more, D], labels: [n]; rows of the weight from `vocabulary` on are padding."""
        table = weight[:vocabulary]
        tokens, rows = len(labels), chunk_rows(len(labels), vocabulary, x.device.type)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, tokens, rows):
            part = x[start : start + rows]
            loss, grad = chunk(part @ table.T, labels[start : start + rows], 1 / tokens)
            total += loss
            if grad_x is not None:
                torch.mm(grad, table, out=grad_x[start : start + rows])
            if needs_weight:
                grad_weight = _accumulated(grad_weight, grad, part, rows < tokens)
        if grad_weight is not None and vocabulary < len(weight):
            grad_weight = F.pad(grad_weight, (0, 0, 0, len(weight) - vocabulary))
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # in place: a second backward raises, because autograd sees that what was saved has changed
        grad_x, grad_weight = (None if saved is None else saved.mul_(grads[0]) for saved in ctx.saved_tensors)
        return grad_x, None if grad_weight is None else grad_weight.to(ctx.dtype), None, None, None


def _accumulated(so_far: Tensor | None, grad: Tensor, x: Tensor, more: bool) -> Tensor:
    """so_far + gradᵀ·x, in fp32 where more chunks follow. grad: [c, V], x: [c, D] → [V, D]."""
    if so_far is None:
        product = grad.T @ x
        return product.float() if more else product
    return so_far.addmm_(grad.T, x) if grad.dtype == so_far.dtype else so_far.add_(grad.T @ x)


class Head(nn.Linear):
    """weight: [V, D], where V is the vocabulary; under tensor parallelism this process's share of it.

    The loss is computed inside the layer's own forward, the only place where ZeRO-3 has the weight gathered.
    """

    def __init__(self, hidden_size: int, vocabulary: int, parallel: TensorParallel) -> None:
        shard = parallel.shard(0, vocabulary)
        super().__init__(hidden_size, shard.local, bias=False)
        if parallel.size > 1:
            mark(self.weight, shard)
        self.shard = shard
        self.chunk_loss: ChunkLoss = chunk_loss
        """May be replaced by a compiled form, which is for training: without gradients the plain one runs."""

    def effective_weight(self) -> Tensor:
        """The weight that multiplies the stream, [V, D]. A fake-quantized head overrides it."""
        return self.weight

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [..., V] of the stream x: [..., D], or their mean cross-entropy in nats against labels [...], fp32."""
        if labels is None:
            return F.linear(x, self.effective_weight())
        chunk = self.chunk_loss if torch.is_grad_enabled() else chunk_loss
        return linear_cross_entropy(x, self.effective_weight(), labels, self.shard, chunk)
