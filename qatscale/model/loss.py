"""The training loss: the cross-entropy of the head's logits, which are never there all at once.

Sizes in comments: n = tokens of a micro-batch, c = tokens of a chunk, V = vocabulary (under tensor parallelism a
process's share), D = hidden size. `F.cross_entropy(head(x).float(), labels)` holds three fp32 tensors [n, V]: 4 GB each
at 32,768 tokens and 32,000 rows of vocabulary. Here a chunk of tokens at a time goes through the product, the softmax
and the gradient's two products, all in the forward pass: the same arithmetic, nothing of it twice. What waits for the
backward pass are the gradients of x [n, D] and of the weight [V, D], for it to multiply by a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

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

    def of_product(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x.flatten(0, -2), weight, labels.flatten(), shard, chunk)

    takeover = _Product(of_product)
    with takeover:
        out = head(x)
    return out if takeover.done else cross_entropy(out, labels, shard)  # a head that makes its product otherwise


class DeferredHead:
    """`head_loss` in two calls, for an engine that calls the model, and then the loss on what the model has returned.

    DeepSpeed's pipeline, in bf16, clears all gradients when that of the model's output arrives, and would lose those
    that the loss has given to parameters by then. So the head's forward runs in the first call, and what the loss
    finds for its weight waits until the gradient of the output has passed. One call of each, then backward, in turns.
    """

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        """What the head multiplies with, without its history."""
        self.grad: Tensor | None = None

    def take(self, head: nn.Module, x: Tensor) -> Tensor:
        """The stream x as it is, [b, t, D], behind which the head's weight waits for its gradient."""

        def of_product(x: Tensor, weight: Tensor) -> Tensor:
            self.weight = weight.detach()
            return _Late.apply(x, weight, self)

        takeover = _Product(of_product)
        with takeover:
            out = head(x)
        assert takeover.done, f"{type(head).__name__} does not make its product by F.linear"
        return out

    def loss(self, x: Tensor, labels: Tensor, shard: Shard | None = None, chunk: ChunkLoss | None = None) -> Tensor:
        """`head_loss` of what `take` gave last."""
        assert self.weight is not None, "take comes before loss"
        x, weight, labels, self.weight = x.flatten(0, -2), self.weight, labels.flatten(), None
        if not torch.is_grad_enabled():
            return linear_cross_entropy(x, weight, labels, shard, chunk)
        return _DeferredCrossEntropy.apply(x, weight, labels, shard, chunk or chunk_loss, self)


LINEAR = F.linear
"""torch's own: for ZeRO-3 DeepSpeed puts another in its place, for all of the process and for good."""


class _Product(TorchFunctionMode):
    """A context in which the first `F.linear` gives `make(x, weight)` instead of its product."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.done = False
        self._make = make
        self._differentiable = torch.is_grad_enabled()

    def __enter__(self) -> Self:
        self._replaced, F.linear = F.linear, LINEAR  # what stands in its place is no torch function, which a mode sees
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        F.linear = self._replaced
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # inside an autograd.Function's forward the gradient is somebody else's: leave it alone
        taken = func is LINEAR and not self.done and torch.is_grad_enabled() == self._differentiable
        if not taken:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        assert not kwargs
        assert bias in ([], [None]), "a head has no bias"
        self.done = True
        return self._make(x, weight)


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
        loss, *gradients = _with_gradients(x, weight, labels, shard, chunk, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # in place: a second backward raises, because autograd sees that what was saved has changed
        grad_x, grad_table = (None if saved is None else saved.mul_(grads[0]) for saved in ctx.saved_tensors)
        return grad_x, None if grad_table is None else grad_table.to(ctx.dtype), None, None, None


class _DeferredCrossEntropy(torch.autograd.Function):
    """As above; the weight's gradient is left with `late`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, shard: Shard | None, chunk: ChunkLoss, late: DeferredHead
    ) -> Tensor:
        loss, *gradients = _with_gradients(x, weight, labels, shard, chunk, True, True)
        ctx.save_for_backward(*gradients)
        ctx.dtype, ctx.late = weight.dtype, late
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        grad_x, grad_table = (saved.mul_(grads[0]) for saved in ctx.saved_tensors)
        ctx.late.grad = grad_table.to(ctx.dtype)
        return grad_x, None, None, None, None, None


class _Late(torch.autograd.Function):
    """Forward: x. Backward: its gradient as it is, and the weight's, which `late` has by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, late: DeferredHead) -> Tensor:  # noqa: ARG004 - its gradient is
        ctx.late = late
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        found, ctx.late.grad = ctx.late.grad, None
        assert found is not None, "the gradient of the stream came before that of the loss"
        return grads[0], found, None


def _with_gradients(
    x: Tensor, weight: Tensor, labels: Tensor, shard: Shard | None, chunk: ChunkLoss, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, its gradient by x, by the weight), the latter in fp32 where it is a sum over chunks."""
    table = weight if shard is None else weight[: shard.size]  # padding of the vocabulary takes part in nothing
    chunk = _losses(shard, chunk)
    tokens, rows = len(labels), chunk_rows(len(labels), len(table), x.device.type)
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
    return total / tokens, grad_x, grad_table


def _accumulated(so_far: Tensor | None, grad: Tensor, x: Tensor, more: bool) -> Tensor:
    """so_far + gradᵀ·x, in fp32 where there are several chunks to add. grad: [c, V], x: [c, D] → [V, D]."""
    if so_far is None:
        product = grad.T @ x
        return product.float() if more else product
    return so_far.addmm_(grad.T, x) if grad.dtype == so_far.dtype else so_far.add_(grad.T @ x)
