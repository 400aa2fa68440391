"""The training loss: the cross-entropy of the head's logits, which are never there all at once.

Sizes in comments: n = tokens of a micro-batch, c = tokens of a chunk, V = vocabulary (under tensor parallelism a
process's share), D = hidden size. `F.cross_entropy(head(x).float(), labels)` holds three fp32 tensors [n, V]: 4 GB each
at 32,768 tokens and 32,000 rows of vocabulary. Here a chunk of tokens at a time goes through the product, the softmax
and the gradient's two products, all in the forward pass: the same arithmetic, nothing of it twice. What waits for the
backward pass are the gradients of x [n, D] and of the weight [V, D], for it to multiply by a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qatscale.model.chunks import chunk_rows
from qatscale.model.tensor_parallel import Shard

ChunkLoss = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(logits [c, V], labels [c], s) → (sum of the losses, fp32 scalar; s · its gradient [c, V] in the logits' type). The
logits may be overwritten."""


def head_loss(
    head: nn.Module, x: Tensor, labels: Tensor, shard: Shard | None = None, chunk: ChunkLoss | None = None
) -> Tensor:
    """Mean cross-entropy in nats of head(x) against the labels: an fp32 scalar. x: [b, t, D], labels: [b, t].

    The head's own forward runs, once, with its hooks: ZeRO-3 gathers the weight around it, and a quantized head passes
    its weight through the quantizer there. Only its product x·Wᵀ is taken over, and gives the loss in place of logits.

    shard: the rows of the vocabulary that the head has, where every process has some; padding is left out.
    chunk: a faster `chunk_loss`; not used where the vocabulary is divided.
    """
    takeover = _LossOfProduct(labels.flatten(), shard, chunk or chunk_loss)
    with takeover:
        out = head(x)
    return out if takeover.done else cross_entropy(out, labels, shard)  # a head that makes its product otherwise


class _LossOfProduct(TorchFunctionMode):
    """A context in which the first `F.linear` gives its cross-entropy."""

    def __init__(self, labels: Tensor, shard: Shard | None, chunk: ChunkLoss) -> None:
        super().__init__()
        self.done = False
        self._labels, self._shard, self._chunk = labels, shard, chunk
        self._differentiable = torch.is_grad_enabled()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # inside an autograd.Function's forward the gradient is somebody else's: leave it alone
        taken = func is F.linear and not self.done and torch.is_grad_enabled() == self._differentiable
        if not taken:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        assert not kwargs
        assert bias in ([], [None]), "a head has no bias"
        self.done = True
        return linear_cross_entropy(x.flatten(0, -2), weight, self._labels, self._shard, self._chunk)


def cross_entropy(logits: Tensor, labels: Tensor, shard: Shard | None = None) -> Tensor:
    """Mean cross-entropy in nats over all positions, in fp32, of logits [b, t, V] that are there. labels: [b, t]."""
    local = logits if shard is None else logits[..., : shard.size]
    rows = local.flatten(0, -2)
    return _CrossEntropy.apply(rows, labels.flatten(), _losses(shard, chunk_loss))


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, shard: Shard | None = None, chunk: ChunkLoss | None = None
) -> Tensor:
    """Mean cross-entropy in nats of the logits x·weightᵀ, an fp32 scalar. x: [n, D], weight: [V, D], labels: [n]."""
    if not torch.is_grad_enabled():  # else the Function would make gradients for parameters that want one elsewhere
        x, weight = x.detach(), weight.detach()
    return _LinearCrossEntropy.apply(x, weight, labels, shard, chunk or chunk_loss)


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
    """`ChunkLoss` in the form that torch.compile makes two kernels of, which keep nothing in fp32: one reads the logits
    for log Σ exp, one reads them again and writes their gradient."""
    wide = logits.float()
    log_sum = wide.logsumexp(dim=-1)
    loss = (log_sum - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).float()).sum()
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    p = (wide - log_sum.unsqueeze(-1)).exp()
    return loss, ((p - is_label.float()) * scale).to(logits.dtype)


def _parallel_chunk_loss(shard: Shard) -> ChunkLoss:
    """`ChunkLoss` of logits of which each process has its share of the vocabulary; no process has all of them.

    Three numbers a row are exchanged: its largest logit, Σ exp, and the label's logit, which one process knows.
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


def _losses(shard: Shard | None, chunk: ChunkLoss) -> ChunkLoss:
    return chunk if shard is None or shard.parallel.size == 1 else _parallel_chunk_loss(shard)


class _CrossEntropy(torch.autograd.Function):
    """Of logits [n, V] at once. Its gradient is made in the forward pass too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, chunk: ChunkLoss) -> Tensor:
        loss, grad = chunk(logits.clone(), labels, 1 / len(labels))
        ctx.save_for_backward(grad)
        return loss / len(labels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, shard: Shard | None, chunk: ChunkLoss) -> Tensor:
        table = weight if shard is None else weight[: shard.size]  # padding of the vocabulary takes part in nothing
        chunk = _losses(shard, chunk)
        tokens, rows = len(labels), chunk_rows(len(labels), len(table), x.device.type)
        of_x, of_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if of_x else None
        grad_table: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, tokens, rows):
            part = x[start : start + rows]
            loss, grad = chunk(part @ table.T, labels[start : start + rows], 1 / tokens)
            total += loss
            if grad_x is not None:
                torch.mm(grad, table, out=grad_x[start : start + rows])
            if of_weight:
                grad_table = _accumulated(grad_table, grad, part, rows < tokens)
        if grad_table is not None and len(table) < len(weight):
            grad_table = F.pad(grad_table, (0, 0, 0, len(weight) - len(table)))
        ctx.save_for_backward(grad_x, grad_table)
        ctx.dtype = weight.dtype
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # in place: a second backward raises, because autograd sees that what was saved has changed
        grad_x, grad_table = (None if saved is None else saved.mul_(grads[0]) for saved in ctx.saved_tensors)
        return grad_x, None if grad_table is None else grad_table.to(ctx.dtype), None, None, None


def _accumulated(so_far: Tensor | None, grad: Tensor, x: Tensor, more: bool) -> Tensor:
    """so_far + gradᵀ·x, in fp32 where there are several chunks to add. grad: [c, V], x: [c, D] → [V, D]."""
    if so_far is None:
        product = grad.T @ x
        return product.float() if more else product
    return so_far.addmm_(grad.T, x) if grad.dtype == so_far.dtype else so_far.add_(grad.T @ x)
