"""The training loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over all positions, in fp32. logits: [b, t, V], labels: [b, t]."""
    return _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten())
