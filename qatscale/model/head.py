"""The output layer, which gives logits or, where labels are given, their loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatscale.model.loss import ChunkLoss, chunk_loss, linear_cross_entropy
from qatscale.model.tensor_parallel import TensorParallel, mark


class Head(nn.Linear):
    """weight: [V, D], where V is the vocabulary; under tensor parallelism this process's share of it.

    The loss is computed inside the layer's own forward, because ZeRO-3 has the weight gathered there and nowhere else.
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
