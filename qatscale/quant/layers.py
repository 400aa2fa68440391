"""Linear, embedding and head layers whose weight can pass through a quantizer.

A layer is converted in place: the module object, its parameters and its hooks stay, its class changes (as
`torch.nn.utils.parametrize` does) and it gains the parameter `weight_scale`. Weight and scale are read only inside the
module's own forward, where ZeRO-3 has them gathered.

Under tensor parallelism a layer holds a part of its matrix. Where the matrix is split by rows, so are its scales. Where
it is split by columns, every process holds a part of each row and the same scale for it. Each process then sees a part
of the scale's gradient, and post-training quantization gathers the full row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatscale.model.head import Head
from qatscale.model.tensor_parallel import Shard, full_shape, mark, shard_of
from qatscale.quant.bit_widths import BY_TEXT, BitsRule, Quantizer, get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.scales import ptq_scale

Mode = Literal["off", "learned", "dynamic"]


class FakeQuant(nn.Module):
    """The part that the layers below share; not a layer by itself.

    mode
        `off`: the plain layer, the scale unused. `learned`: the weight is quantized with `weight_scale`, and both get
        gradients. `dynamic`: post-training quantization. The scale is searched for on the first forward after the mode
        is set, and then kept; the weight gets no gradient.
    calibrated
        Whether `weight_scale` holds a scale. Before the switch it is 1 everywhere and means nothing.
    """

    weight: nn.Parameter
    _mode: Mode

    @classmethod
    def convert(
        cls,
        module: nn.Module,
        bits: float,
        *,
        rule: BitsRule | None = None,
        group_size: int | None = None,
        scale: nn.Parameter | None = None,
        use_grad_factor: bool = True,
    ) -> Self:
        """Turns a plain layer into this class, in place, in mode `off`.

        rule: the bits in a view at other bits; None: just those.
        scale: the parameter of a layer that shares the weight; None makes a new one, fp32, [rows] or [rows, groups].
        use_grad_factor: whether dL/dα is multiplied by LSQ's g.
        """
        assert type(module) in cls.__bases__, f"{type(module).__name__} does not convert to {cls.__name__}"
        module.__class__ = cls
        assert isinstance(module, cls)
        module._begin(bits, rule or BitsRule(), group_size, scale, use_grad_factor)
        return module

    def _begin(
        self, bits: float, rule: BitsRule, group_size: int | None, scale: nn.Parameter | None, use_grad_factor: bool
    ) -> None:
        rows, channels = self.weight.shape
        assert group_size is None or channels % group_size == 0
        if scale is None:
            shape = (rows,) if group_size is None else (rows, channels // group_size)
            scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=self.weight.device))
            if shard := _shard_of_scales(self.weight, group_size):
                mark(scale, shard)
        self.weight_scale = scale
        # Bits are kept as text, and g is computed anew in each forward. torch.compile (2.13) specialises on strings and
        # on a module's integers. It makes a variable of a float that differs between layers or modes, and cannot pass a
        # variable into an autograd.Function.
        self._bits = self._dynamic_bits = get_quantizer(bits).bits_text
        self.rule, self.group_size, self.use_grad_factor = rule, group_size, use_grad_factor
        self.full_numel = math.prod(full_shape(self.weight))
        """Weights of the full matrix, over all processes, for LSQ's g."""
        self.calibrated = False
        self.mode = "off"

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode {mode!r}: one of {', '.join(get_args(Mode))}")
        self._mode = mode
        self._dynamic_scale: Tensor | None = None

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of mode `learned`."""
        return BY_TEXT[self._bits]

    @property
    def dynamic_quantizer(self) -> Quantizer:
        """The quantizer of mode `dynamic`; set it before the mode."""
        return BY_TEXT[self._dynamic_bits]

    @dynamic_quantizer.setter
    def dynamic_quantizer(self, quantizer: Quantizer) -> None:
        self._dynamic_bits = quantizer.bits_text
        self._dynamic_scale = None

    @property
    def grad_factor(self) -> float:
        return self.quantizer.grad_factor(self.full_numel) if self.use_grad_factor else 1.0

    def effective_weight(self) -> Tensor:
        """The weight that the layer computes with in its present mode, in the shape and dtype of `weight`."""
        if self._mode == "off":
            return self.weight
        if self._mode == "learned":
            return fake_quantize(self.quantizer, self.weight, self._learned_scale(), self.grad_factor)
        return fake_quantize(self.dynamic_quantizer, self.weight.detach(), self.dynamic_scale())

    def _learned_scale(self) -> Tensor:
        """`weight_scale`, its gradient summed over the processes that share its rows."""
        if self._rows_are_split:
            return shard_of(self.weight).parallel.shared(self.weight_scale)  # type: ignore[union-attr]
        return self.weight_scale

    @torch.compiler.disable  # traced, the search's unrolled loop takes a compiler minutes
    def dynamic_scale(self) -> Tensor:
        """The least-squares scale of the present weights, searched for once per setting of `mode`."""
        if self._dynamic_scale is None:
            rows = self.weight.detach()
            if self._rows_are_split:
                rows = shard_of(self.weight).gather(rows)  # type: ignore[union-attr]
            self._dynamic_scale = ptq_scale(self.dynamic_quantizer, rows, self.group_size)
        return self._dynamic_scale

    @property
    def _rows_are_split(self) -> bool:
        """Whether a row, the unit that a scale belongs to, lies on several processes."""
        return shard_of(self.weight) is not None and shard_of(self.weight_scale) is None

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{super().extra_repr()}, bits={self._bits}{groups}, mode={self._mode}"


class FakeQuantLinear(FakeQuant, nn.Linear):
    """y = x · quantize(weight)ᵀ + bias. weight: [out, in]; weight_scale: [out] or [out, groups]."""

    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight(), self.bias)


class FakeQuantHead(FakeQuant, Head):
    """A `Head` with quantize(weight) in place of its weight. weight_scale: [vocabulary] or [vocabulary, groups]."""

    weight: nn.Parameter


class FakeQuantEmbedding(FakeQuant, nn.Embedding):
    """Rows of quantize(weight). weight: [vocabulary, channels]; weight_scale: [vocabulary] or [vocabulary, groups].

    Only the rows that are looked up are quantized. A row that is looked up n times gets the sum of n gradients, so
    forward and gradients equal those of quantizing the entire table.
    """

    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """input: token ids [...] -> [..., channels]."""
        rows = self._rows(input, self.weight)
        if self._mode == "off":
            return rows
        if self._mode == "learned":
            return fake_quantize(self.quantizer, rows, self._scales(input, self.weight_scale), self.grad_factor)
        return fake_quantize(self.dynamic_quantizer, rows.detach(), self._scales(input, self.dynamic_scale()))

    def _rows(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table, self.padding_idx, None, 2.0, self.scale_grad_by_freq, False)

    def _scales(self, ids: Tensor, scale: Tensor) -> Tensor:
        """[...] or [..., groups]. The rows' lookup again: padding and frequencies treat both gradients alike."""
        return self._rows(ids, scale) if scale.dim() == 2 else self._rows(ids, scale.unsqueeze(-1)).squeeze(-1)


FakeQuantLayer = FakeQuantLinear | FakeQuantHead | FakeQuantEmbedding
FAKE_QUANT: dict[type[nn.Module], type[FakeQuantLinear] | type[FakeQuantHead] | type[FakeQuantEmbedding]] = {
    nn.Linear: FakeQuantLinear,
    Head: FakeQuantHead,
    nn.Embedding: FakeQuantEmbedding,
}
"""Plain layer -> the class that it converts to."""


def _shard_of_scales(weight: Tensor, group_size: int | None) -> Shard | None:
    """Which of a matrix's scales belong to this process's part of it; None: all."""
    shard = shard_of(weight)
    if shard is None or (shard.dim == 1 and group_size is None):
        return None
    if shard.dim == 0:
        return shard
    assert group_size is not None
    assert shard.start % group_size == shard.local % group_size == 0, "a group lies on two processes"
    return replace(
        shard,
        start=shard.start // group_size,
        size=shard.size // group_size,
        local=shard.local // group_size,
        full=shard.full // group_size,
    )
