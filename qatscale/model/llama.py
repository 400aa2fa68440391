"""Llama 2 (arXiv 2307.09288): RMSNorm, rotary positions, SwiGLU, grouped-query attention, no bias.

By configuration also what Llama 3.1 (scaled rotary positions), Qwen2 (biases of q, k, v) and Qwen3 (normed q and k,
heads of any size) add to it.

Sizes in comments: b = sequences, t = tokens of a sequence, h = heads (query or key-value), d = channels of a head,
D = hidden size, V = vocabulary. The arithmetic is that of transformers' LlamaForCausalLM, MistralForCausalLM,
Qwen2ForCausalLM and Qwen3ForCausalLM, so weights convert in both directions without permutation. In bf16 the two
differ, because norms and rotations are rounded only once here.

Weights are read only inside the forward of the module that owns them: ZeRO-3 gathers a weight around that call, and the
QAT plugin replaces these modules.

A process may hold a part of the model: a share of every matrix (`TensorParallel`), a run of blocks (`Stage`), or both.
Parameters keep their names in the full model. Under tensor parallelism, h, V and the MLP's inner size are a process's
share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qatscale.config.schema import ModelConfig
from qatscale.model.documents import Documents, attend, find_documents, has_kernel
from qatscale.model.head import Head
from qatscale.model.stages import Stage
from qatscale.model.tensor_parallel import (
    UNSPLIT,
    TensorParallel,
    column_parallel_linear,
    look_up,
    row_parallel_linear,
    vocabulary_parallel_embedding,
)

Rotation = tuple[Tensor, Tensor]
"""(cos, sin), each [t, 1, d] or [b, t, 1, d] in fp32; `sin` carries the minus sign of the first half."""


def rotation_tables(
    length: int,
    channels: int,
    theta: float,
    device: torch.device | str | None = None,
    scaling: tuple[float, ...] | None = None,
) -> Rotation:
    """Rotary position embedding (arXiv 2104.09864) of positions 0 … length - 1 for heads of `channels` channels.

    Channel i turns together with channel i + channels/2 ("half-split", as in Hugging Face's Llama), by
    theta^(-2i/channels) radians per position. The tables are computed in every forward, which costs little beside one
    block and works for any length and device. A buffer would be cast to bf16 with the model, and in bf16 positions from
    2,048 on are multiples of 16. scaling: see `scaled_frequencies`.
    """
    pair = torch.arange(0, channels, 2, dtype=torch.float32, device=device)
    position = torch.arange(length, dtype=torch.float32, device=device)
    frequency = 1.0 / theta ** (pair / channels)
    frequency = scaled_frequencies(frequency, *scaling) if scaling else frequency
    angle = torch.outer(position, frequency).unsqueeze(1)  # [t, 1, d/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def scaled_frequencies(frequency: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """Llama 3.1's frequencies for longer contexts (`apply_scaling` of Meta's llama-models), in radians per position.

    A wavelength that fits `high` times or more into the `original` positions stays, one that fits `low` times or less
    is stretched by `factor`, and the frequencies between are interpolated linearly in the number of times.
    """
    times = original * frequency / (2 * math.pi)
    kept = ((times - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x: [b, t, h, d] by its positions, in fp32; the result has the dtype of x."""
    cos, sin = rotation
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate)·up, of any one shape."""
    return F.silu(gate) * up


class Attention(nn.Module):
    """Causal self-attention, [b, t, D] → [b, t, D].

    The number of heads follows from the projections' outputs: under tensor parallelism they return a share of them.
    """

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        kv_heads = config.kv_heads or config.heads
        self.channels = channels = config.channels
        self.grouped = kv_heads < config.heads
        self.parallel = parallel
        bias = config.attention_bias
        self.q = column_parallel_linear(config.hidden_size, config.heads * channels, parallel, bias)
        self.k = column_parallel_linear(config.hidden_size, kv_heads * channels, parallel, bias)
        self.v = column_parallel_linear(config.hidden_size, kv_heads * channels, parallel, bias)
        self.o = row_parallel_linear(config.heads * channels, config.hidden_size, parallel)
        self.q_norm = RMSNorm(config, parallel, channels) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config, parallel, channels) if config.qk_norm else nn.Identity()
        self.timed: Callable[[], AbstractContextManager[None]] = nullcontext
        """A context around the part without weights and exchanges."""
        self.rotate = rotate

    def forward(self, x: Tensor, rotation: Rotation, documents: Documents | None) -> Tensor:
        x = self.parallel.enter(x)
        heads = (*x.shape[:-1], -1, self.channels)
        q = self.rotate(self.q_norm(self.q(x).view(heads)), rotation).transpose(1, 2)  # [b, h, t, d]
        k = self.rotate(self.k_norm(self.k(x).view(heads)), rotation).transpose(1, 2)
        v = self.v(x).view(heads).transpose(1, 2)
        with self.timed():
            mixed = attend(q, k, v, self.grouped, documents)
        return self.parallel.leave(self.o(mixed.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202), [b, t, D] → [b, t, D]."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.parallel = parallel
        self.gate = column_parallel_linear(config.hidden_size, config.intermediate_size, parallel)
        self.up = column_parallel_linear(config.hidden_size, config.intermediate_size, parallel)
        self.down = row_parallel_linear(config.intermediate_size, config.hidden_size, parallel)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        x = self.parallel.enter(x)
        return self.parallel.leave(self.down(self.gated(self.gate(x), self.up(x))))


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm`, which sums squares in fp32 for every input dtype. The stream may be split along the sequence.

    channels: of a head, where heads are normed; None = of the stream.
    """

    def __init__(self, config: ModelConfig, parallel: TensorParallel, channels: int | None = None) -> None:
        super().__init__(channels or config.hidden_size, eps=config.norm_eps)
        self.parallel = parallel
        self.shares = parallel.sequence or channels is not None
        """Whether each process sees a part of the sequence or of the heads, and so has a part of the gain's gradient"""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.parallel.shared(self.weight) if self.shares else self.weight
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config, parallel)
        self.attention = Attention(config, parallel)
        self.mlp_norm = RMSNorm(config, parallel)
        self.mlp = MLP(config, parallel)

    def forward(self, x: Tensor, rotation: Rotation, documents: Documents | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, documents)
        return x + self.mlp(self.mlp_norm(x))


RunBlock = Callable[[nn.Module, Tensor, Rotation, Documents | None], Tensor]


def run_block(block: nn.Module, x: Tensor, rotation: Rotation, documents: Documents | None) -> Tensor:
    """Apply a `Block` to the stream x: [b, t, D]. One compiled form can replace this function for all blocks."""
    return block(x, rotation, documents)


class Llama(nn.Module):
    """The language model. Set its weights with `initialise` or `load_state_dict` before use.

    `activation_checkpointing` keeps only the input of each block for the backward pass and recomputes the rest.
    `parallel` and `stage`: the part of the model that this process holds. Blocks of other stages are `nn.Identity`.
    """

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: bool = False,
        parallel: TensorParallel = UNSPLIT,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.parallel = parallel
        self.run_block: RunBlock = run_block
        """May be replaced by a compiled form for training; without gradients the plain one runs."""
        self.document_end: int | None = None
        """The token that divides documents, where attention and positions do not cross their borders."""
        self.stage = stage = stage or Stage(0, 1, range(config.layers))
        if stage.is_first:
            self.embed = vocabulary_parallel_embedding(config.vocab_size, config.hidden_size, parallel)
        self.blocks = nn.ModuleList(
            Block(config, parallel) if i in stage.blocks else nn.Identity() for i in range(config.layers)
        )
        if stage.is_last:
            self.norm = RMSNorm(config, parallel)
            self.head = Head(config.hidden_size, config.vocab_size, parallel)
        self._tie()

    def use_parts(self, rotate: Callable[..., Tensor], gated: Callable[..., Tensor]) -> None:
        """Compute `rotate` and `gated` by these functions, which may be compiled ones."""
        for block in self.blocks:
            if isinstance(block, Block):
                block.attention.rotate, block.mlp.gated = rotate, gated

    @property
    def tied_embedding(self) -> bool:
        """Whether embedding and head are one table, even where they are on two stages."""
        return self.config.tied_embedding

    def forward(self, x: Tensor, labels: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Logits [b, t, V] of tokens [b, t], or their loss where labels [b, t] are given.

        `labels[:, i]` is the token that follows `tokens[:, i]`: the caller shifts. The loss is the mean cross-entropy
        over all b·t positions in nats, an fp32 scalar. Every stage but the first takes the residual stream [b, t, D];
        every stage but the last returns it. With `document_end` these stages also take the `tokens`.
        """
        tokens = x if tokens is None else tokens
        if self.stage.is_first:
            x = self.parallel.leave(look_up(self.embed, x, self.parallel, self.config.vocab_size))
        length = x.shape[1] * (self.parallel.size if self.parallel.sequence else 1)
        config = self.config
        rotation = rotation_tables(length, config.channels, config.rope_theta, x.device, config.rope_scaling)
        documents = None
        if self.document_end is not None:
            documents = find_documents(tokens, self.document_end, has_kernel(x, config.channels))
            rotation = rotation[0][documents.positions], rotation[1][documents.positions]
        trains = torch.is_grad_enabled()
        run = self.run_block if trains else run_block
        for i in self.stage.blocks:
            if trains and self.activation_checkpointing:  # blocks draw no random numbers, so no state is preserved
                x = checkpoint(
                    run, self.blocks[i], x, rotation, documents, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = run(self.blocks[i], x, rotation, documents)
        if not self.stage.is_last:
            return x.contiguous()  # it is sent as it is laid out in memory
        assert not self._ties or self.head.weight is self.embed.weight, "head and embedding are no longer tied"
        return self.head(self.parallel.enter(self.norm(x)), labels)

    @property
    def _ties(self) -> bool:
        return self.config.tied_embedding and self.stage.count == 1

    def _tie(self) -> None:
        if self._ties:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, but tied weights stay one: `to_empty` makes a new Parameter per module, which unties them."""
        super()._apply(fn, recurse)
        self._tie()
        return self


@functools.cache
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Name → full shape of every parameter, in the order of `Llama.named_parameters()`, without a tied head."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Llama(config).named_parameters()}


def canonical_name(name: str, config: ModelConfig) -> str:
    """The name of a parameter in the full model: on a last stage, a tied head is the embedding's table."""
    return f"embed.{name.removeprefix('head.')}" if config.tied_embedding and name.startswith("head.") else name


def is_norm(name: str) -> bool:
    """Whether a parameter of this name is the gain of a norm: initially 1, without weight decay, never quantized."""
    return name.endswith("norm.weight")
