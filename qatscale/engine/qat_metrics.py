"""How the quantizers train: the share of scales at their floor, and the share of codes that flip in a step.

Both are counted on the fp32 masters, each process on those it holds, so they do not depend on the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatscale.engine.zero_masters import Fragment, ZeroMasters
from qatscale.quant.bit_widths import SCALE_FLOOR, Quantizer
from qatscale.quant.plugin import FakeQuantLayer, matrices
from qatscale.quant.reference import encode

SAMPLE = 1 << 20
"""Weights of a model whose codes are compared, about; of a larger model the middle rows of every matrix."""


class QatMetrics:
    """Counts over the quantized matrices of a prepared `model`. n_params: of the entire model."""

    def __init__(self, masters: ZeroMasters, model: nn.Module, n_params: int) -> None:
        self._masters = masters
        self._layers = [layer for _, layer in matrices(model)]
        scales = {id(layer.weight_scale) for layer in self._layers}
        self._scales = [f for f in masters.fragments if f.saved and id(f.parameter) in scales]
        share = min(1.0, SAMPLE / n_params)
        self._pieces = [self._pieces_of(layer, share) for layer in self._layers]
        self._before: list[Tensor] | None = None

    def _pieces_of(self, layer: FakeQuantLayer, share: float) -> list[tuple[Fragment, int, int]]:
        """Each piece is elements [low, high) of the flattened matrix or columns that the fragment is of."""
        rows, channels = self._masters.shapes[self._masters.names[id(layer.weight)]]
        count = max(1, round(rows * share))
        skipped = (rows - count) // 2
        pieces = []
        for fragment in self._masters.fragments:
            if fragment.parameter is layer.weight and fragment.saved:
                first, end = fragment.columns or (0, channels)
                low = max(fragment.start, skipped * (end - first))
                high = min(fragment.start + fragment.numel, (skipped + count) * (end - first))
                if low < high:
                    pieces.append((fragment, low, high))
        return pieces

    def before_step(self) -> None:
        """Keeps the codes of the sample, to be compared after the optimizer step. Collective."""
        self._before = self._codes()

    def counts(self) -> Tensor:
        """[scales at or under the floor, scales, codes that differ from those before the step, codes compared].

        Those of this process, in float64: their sums over all processes are the model's. The last two are 0 without
        `before_step`. Collective.
        """
        scales = [fragment.of(fragment.partition) for fragment in self._scales]
        floored = sum(int((scale <= SCALE_FLOOR).sum()) for scale in scales)
        flipped = compared = 0
        if self._before is not None:
            after = self._codes()
            flipped = sum(int((new != old).sum()) for new, old in zip(after, self._before, strict=True))
            compared = sum(codes.numel() for codes in after)
            self._before = None
        found = [floored, sum(scale.numel() for scale in scales), flipped, compared]
        return torch.tensor(found, dtype=torch.float64, device=self._masters.device)

    @torch.no_grad()
    def _codes(self) -> list[Tensor]:
        """The codes of this process's part of the sample, as forward has them; one tensor per bit width."""
        found: dict[Quantizer, list[tuple[Tensor, Tensor]]] = {}
        scales = self._masters.full_all([layer.weight_scale for layer in self._layers])
        for layer, scale, pieces in zip(self._layers, scales, self._pieces, strict=True):
            for fragment, low, high in pieces:
                channels = self._masters.shapes[fragment.name][1]
                weights = fragment.of(fragment.partition)[low - fragment.start : high - fragment.start]
                pairs = found.setdefault(layer.quantizer, [])
                pairs.append((weights, _scale_of_each(scale.to(weights.device), fragment, channels, low, high)))
        dtype = self._layers[0].weight.dtype
        return [
            encode(
                quantizer,
                torch.cat([w for w, _ in pairs]).to(dtype).unsqueeze(-1),
                torch.cat([scale for _, scale in pairs]).to(dtype),
            )
            for quantizer, pairs in found.items()
        ]


def _scale_of_each(scale: Tensor, fragment: Fragment, channels: int, low: int, high: int) -> Tensor:
    """The scale of each weight of a piece. scale: [rows] or [rows, groups], of a matrix [rows, channels]."""
    by_group = scale.view(scale.shape[0], -1)
    first, end = fragment.columns or (0, channels)
    place = torch.arange(low, high, device=scale.device)
    row, column = place // (end - first), place % (end - first) + first
    return by_group[row, column * by_group.shape[1] // channels]
