"""Quantized weights made once for all the micro-batches of an optimizer step.

What a weight is quantized to depends on the step and not on the micro-batch. Held from the first micro-batch to the
last, it also serves the recomputation of checkpointed blocks, and every micro-batch that a pipeline has under way. It
is what autograd keeps from forward to backward anyway: without checkpointing, holding it costs no memory at the fullest
moment of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qatscale.quant.layers import FakeQuantLinear


class WeightCache:
    """Of the Linear layers of a prepared model. (An embedding quantizes just the rows that it looks up.)

    enabled: False = never holds anything.
    """

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, FakeQuantLinear)] if enabled else []

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Within it weights and scales stay as they are; call `release` before they change, or leave.

        Layers that are not in mode `learned` hold nothing. Whatever changes a weight, a scale or a mode (a load, the
        switch, a view) belongs outside.
        """
        try:
            for layer in self._layers:
                if layer.mode == "learned":
                    layer.hold()
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Give back what is held. Autograd keeps what it still needs."""
        for layer in self._layers:
            layer.release()


NOTHING_HELD = WeightCache(nn.Module(), enabled=False)
