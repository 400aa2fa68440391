"""A small model with the project's module names, for tests of the plugin alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qatscale.config.schema import QatConfig
from qatscale.quant.plugin import PlainMasters, QatPlugin, scale_groups

VOCABULARY, WIDTH, HIDDEN = 40, 32, 48


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class TinyModel(nn.Module):
    """forward(tokens: [b, t], labels: [b, t]) -> mean loss."""

    def __init__(self, tied: bool = True, layers: int = 2, seed: int = 0, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.recompute = recompute
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), labels.flatten())


def prepared(
    switch_step: int | None = 3, tied: bool = True, **qat: object
) -> tuple[TinyModel, QatPlugin, torch.optim.AdamW, PlainMasters]:
    """A prepared model with its optimizer, before the switch."""
    model = TinyModel(tied)
    plugin = QatPlugin(QatConfig(**{"scheme": "fused", **qat}), switch_step)
    plugin.prepare(model)
    scales = scale_groups(model)
    of_scales = {id(p) for group in scales.values() for p in group}
    groups = [{"params": [p for p in model.parameters() if id(p) not in of_scales]}]
    groups += [{"params": group, "weight_decay": 0.0} for group in scales.values()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    return model, plugin, optimizer, PlainMasters(optimizer)


TRANSITIONS = torch.softmax(2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5)), -1)
"""[token, next token] -> probability. To know 40 random distributions takes precise logits, so that bits matter."""


def entropy() -> float:
    """Nats per token that no model of the transitions can go below."""
    share = torch.full((VOCABULARY,), 1 / VOCABULARY)
    for _ in range(200):  # the stationary distribution
        share = share @ TRANSITIONS
    return -(share.unsqueeze(-1) * TRANSITIONS * TRANSITIONS.log()).sum().item()


def a_batch(seed: int = 1, sequences: int = 4, length: int = 16) -> tuple[Tensor, Tensor]:
    """(tokens, labels), each [sequences, length], of a Markov chain with TRANSITIONS."""
    generator = torch.Generator().manual_seed(seed)
    chain = [torch.randint(VOCABULARY, (sequences,), generator=generator)]
    for _ in range(length):
        chain.append(torch.multinomial(TRANSITIONS[chain[-1]], 1, generator=generator).squeeze(-1))
    tokens = torch.stack(chain, dim=1)
    return tokens[:, :-1], tokens[:, 1:]
