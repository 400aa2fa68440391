"""Weights that are quantized once for several micro-batches: nothing but the number of quantizations changes."""

from __future__ import annotations

import pytest
import torch
from quant_models import TinyModel, a_batch
from torch import Tensor, nn

from qatscale.config.schema import QatConfig
from qatscale.quant import layers
from qatscale.quant.cache import WeightCache
from qatscale.quant.kernels import dispatch
from qatscale.quant.layers import FakeQuantLinear
from qatscale.quant.plugin import PlainMasters, QatPlugin
from qatscale.quant.views import view


def switched(recompute: bool = False) -> TinyModel:
    model = TinyModel(recompute=recompute)
    plugin = QatPlugin(QatConfig(scheme="scratch", bits=2), 0)
    plugin.prepare(model)
    plugin.maybe_switch(0, PlainMasters(torch.optim.AdamW(model.parameters())))
    return model


def step(model: nn.Module, batches: int = 2) -> list[Tensor]:
    """Losses, then the accumulated gradients."""
    model.zero_grad(set_to_none=True)
    losses = []
    for seed in range(batches):
        loss = model(*a_batch(seed=seed))
        loss.backward()
        losses.append(loss.detach())
    return losses + [p.grad for p in model.parameters()]


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what is quantized."""
    shapes: list[torch.Size] = []

    def noted(quantizer, w, alpha, original=dispatch.quantize):  # type: ignore[no-untyped-def]
        shapes.append(w.shape)
        return original(quantizer, w, alpha)

    monkeypatch.setattr(dispatch, "quantize", noted)
    monkeypatch.setattr(layers, "quantize", noted)
    return shapes


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_is_the_same_to_the_bit_with_each_weight_quantized_once(
    recompute: bool, quantized: list[torch.Size]
) -> None:
    model = switched(recompute)
    quantized.clear()
    expected = step(model)
    without = len(quantized)
    linears = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    inside_blocks = len(linears) - 1
    lookups = 2  # of the embedding, one a micro-batch
    assert without == 2 * (len(linears) + inside_blocks * recompute) + lookups

    quantized.clear()
    with WeightCache(model, enabled=True).filled():
        found = step(model)
    assert len(quantized) == len(linears) + lookups
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_is_held_outside_nor_where_it_is_not_enabled_or_not_quantized() -> None:
    model = switched()
    linear = model.blocks[0].mlp.up
    with WeightCache(model, enabled=True).filled():
        assert linear._held is not None
        before = model(*a_batch())
    assert linear._held is None
    with torch.no_grad():
        linear.weight.mul_(3.0)
    assert model(*a_batch()) != before, "a weight that has changed is quantized anew"
    with WeightCache(model, enabled=False).filled():
        assert linear._held is None
    with view(model, "fp"), WeightCache(model, enabled=True).filled():
        assert linear._held is None
    with pytest.raises(RuntimeError, match="a step fails"), WeightCache(model, enabled=True).filled():
        raise RuntimeError("a step fails")
    assert linear._held is None


def test_another_view_does_not_see_what_is_held() -> None:
    model, batch = switched(), a_batch()
    with view(model, "fp"):
        full = model(*batch)
    with WeightCache(model, enabled=True).filled():
        with view(model, "fp"):
            assert torch.equal(model(*batch), full)
        quantized = model(*batch)
    assert torch.equal(model(*batch), quantized)


def test_a_compiled_block_is_compiled_once_for_all_steps() -> None:
    """And once more where nothing is held, as in evaluation; held weights are new tensors every step."""
    from torch._dynamo.utils import counters

    model = switched()
    expected = step(model)
    torch._dynamo.reset()
    counters.clear()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, fullgraph=True, backend="aot_eager")
    cache = WeightCache(model, enabled=True)
    for _ in range(3):
        with cache.filled():
            found = step(model)
    assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    step(model)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
