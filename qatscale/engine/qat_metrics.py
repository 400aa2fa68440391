"""How the quantizers train: the share of scales at their floor, and the share of codes that flip in a step.

Both are counted on the fp32 masters, each process on those it holds, so they do not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qatscale.engine.zero_masters import Fragment, ZeroMasters
from qatscale.model.tensor_parallel import shard_of
from qatscale.quant.bit_widths import SCALE_FLOOR, Quantizer
from qatscale.quant.plugin import FakeQuantLayer, matrices
from qatscale.quant.reference import encode

SAMPLE = 1 << 18
"""Weights of a model whose codes are compared, about; of a larger model the middle rows of every matrix. A share of 1 %
is then right to 2 % of itself. A record takes 7 ms on a CPU; of all 759K weights of a model it took 14."""


Piece = tuple[Fragment, int, int, Tensor]
"""(fragment, low, high, places): elements [low, high) of a flattened matrix, or of the columns of it that the fragment
is of; and for each element the place of its scale among those of all layers."""


class QatMetrics:
    """Counts over the quantized matrices of a prepared `model`. n_params: of the entire model."""

    def __init__(self, masters: ZeroMasters, model: nn.Module, n_params: int) -> None:
        self._masters = masters
        self._layers = [layer for _, layer in matrices(model)]
        self._scales = [layer.weight_scale for layer in self._layers]
        self._own_scales = [f for f in masters.fragments if f.saved and any(f.parameter is s for s in self._scales)]
        self._scales_are_whole = masters.stage < 3 and not any(map(shard_of, self._scales))
        self._sample: dict[Quantizer, list[Piece]] = {}
        share, start = min(1.0, SAMPLE / n_params), 0
        for layer in self._layers:
            if pieces := list(self._pieces_of(layer, share, start)):
                self._sample.setdefault(layer.quantizer, []).extend(pieces)
            start += masters.shapes[masters.names[id(layer.weight_scale)]].numel()
        self._before: list[Tensor] | None = None

    def _pieces_of(self, layer: FakeQuantLayer, share: float, start: int) -> Iterator[Piece]:
        """start: scales of the layers before."""
        rows, channels = self._masters.shapes[self._masters.names[id(layer.weight)]]
        groups = channels // (layer.group_size or channels)
        count = max(1, round(rows * share))
        skipped = (rows - count) // 2
        for fragment in self._masters.fragments:
            if fragment.parameter is layer.weight and fragment.saved:
                first, end = fragment.columns or (0, channels)
                low = max(fragment.start, skipped * (end - first))
                high = min(fragment.start + fragment.numel, (skipped + count) * (end - first))
                if low < high:
                    place = torch.arange(low, high, device=fragment.partition.device)
                    row, column = place // (end - first), place % (end - first) + first
                    yield fragment, low, high, start + row * groups + column * groups // channels

    def before_step(self) -> None:
        """Keeps the codes of the sample, to be compared after the optimizer step. Collective."""
        self._before = self._codes()

    def counts(self) -> Tensor:
        """[scales at or under the floor, scales, codes that differ from those before the step, codes compared].

        Those of this process, in float64: their sums over all processes are the model's. The last two are 0 without
        `before_step`. Collective.
        """
        scales = [fragment.of(fragment.partition) for fragment in self._own_scales]
        floored = int((torch.cat(scales) <= SCALE_FLOOR).sum()) if scales else 0
        before, self._before = self._before, None
        after = [] if before is None else self._codes()
        flipped = sum(int((new != old).sum()) for new, old in zip(after, before or [], strict=True))
        found = [floored, sum(map(Tensor.numel, scales)), flipped, sum(map(Tensor.numel, after))]
        return torch.tensor(found, dtype=torch.float64, device=self._masters.device)

    @torch.no_grad()
    def _codes(self) -> list[Tensor]:
        """The codes of this process's part of the sample, as forward has them; one tensor per bit width."""
        # An exchange that working copies spare took 7 of the 10 ms of a record of two processes.
        by_layer = self._scales if self._scales_are_whole else self._masters.full_all(self._scales)
        scales = torch.cat([scale.flatten() for scale in by_layer])
        dtype, found = self._layers[0].weight.dtype, []
        for quantizer, pieces in self._sample.items():
            weights = torch.cat([f.of(f.partition)[low - f.start : high - f.start] for f, low, high, _ in pieces])
            of_each = scales.to(weights.device)[torch.cat([places for *_, places in pieces])]
            found.append(encode(quantizer, weights.to(dtype).unsqueeze(-1), of_each.to(dtype)))
        return found
