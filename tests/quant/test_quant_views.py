"""The three views of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatscale.config.schema import QatConfig
from qatscale.errors import UserError
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.plugin import PlainMasters, QatPlugin, view
from qatscale.quant.scales import ptq_scale
from qatscale.quant.selection import fake_quant_modules
from tests.quant.quant_models import TinyModel, a_batch
from tests.wrong_values import NO_SUCH_BITS


def a_model(switched: bool = True, tied: bool = True, **qat: object) -> TinyModel:
    model = TinyModel(tied)
    plugin = QatPlugin(QatConfig(scheme="fused", **{"bits": 2, **qat}), 0)
    plugin.prepare(model)
    if switched:
        plugin.maybe_switch(0, PlainMasters(torch.optim.AdamW(model.parameters())))
    return model


def ptq_by_hand(model: TinyModel, bits: float, embedding_bits: float | None, group_size: int | None = None) -> float:
    """Loss of a plain model whose weights were replaced by quantized ones."""
    plain = TinyModel(model.head.weight is model.embed.weight)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "weight_scale" not in k})
    seen = set()
    for name, module in plain.named_modules():
        width = embedding_bits if name in ("embed", "head") else bits
        if isinstance(module, nn.Linear | nn.Embedding) and width is not None and id(module.weight) not in seen:
            seen.add(id(module.weight))
            quantizer, w = get_quantizer(width), module.weight.detach()
            module.weight.data.copy_(fake_quantize(quantizer, w, ptq_scale(quantizer, w, group_size)))
    return plain(*a_batch()).item()


def test_fp_and_quantized_views() -> None:
    model, batch = a_model(), a_batch()
    plain = TinyModel()(*batch).item()
    quantized = model(*batch).item()
    assert plain != quantized
    with view(model, "fp"):
        assert model(*batch).item() == plain
        with view(model, "quantized"):
            assert model(*batch).item() == quantized
        assert model(*batch).item() == plain
    assert model(*batch).item() == quantized


@pytest.mark.parametrize("switched", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize(("bits", "embedding"), [(None, 4), (1, 4), (3, 4), (6, 6)])
def test_ptq_view_is_quantizing_the_weights_by_hand(
    switched: bool, group_size: int | None, bits: float | None, embedding: float
) -> None:
    model, batch = a_model(switched, group_size=group_size), a_batch()
    before = model(*batch).item()
    with view(model, "ptq", bits):
        found = model(*batch).item()
    assert found == pytest.approx(ptq_by_hand(model, bits or 2, embedding, group_size), rel=1e-6)
    assert model(*batch).item() == before


def test_ptq_follows_the_recipes_embedding_bits() -> None:
    fixed, untied = a_model(embedding_bits=8), a_model(tied=False)
    with view(fixed, "ptq", 3):
        assert fixed(*a_batch()).item() == pytest.approx(ptq_by_hand(fixed, 3, 8), rel=1e-6)
    with view(untied, "ptq", 3):
        assert untied(*a_batch()).item() == pytest.approx(ptq_by_hand(untied, 3, None), rel=1e-6)


def test_each_ptq_view_searches_once_and_sees_the_weights_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = a_model(), a_batch()
    calls = []
    monkeypatch.setattr(  # counts, and still searches
        "qatscale.quant.layers.ptq_scale", lambda *args: calls.append(1) or ptq_scale(*args)
    )
    with view(model, "ptq", 2):
        first = model(*batch).item()
        assert model(*batch).item() == first
    assert len(calls) == len(list(fake_quant_modules(model)))
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.mul_(3)
    with view(model, "ptq", 2):
        assert model(*batch).item() == pytest.approx(ptq_by_hand(model, 2, 4), rel=1e-6) != first


def test_modes_come_back_after_an_error() -> None:
    model = a_model()
    before = [(module.mode, module.dynamic_quantizer) for _, module in fake_quant_modules(model)]
    with pytest.raises(KeyError), view(model, "ptq", 3):
        raise KeyError
    assert [(module.mode, module.dynamic_quantizer) for _, module in fake_quant_modules(model)] == before


def test_wrong_views_are_errors_that_change_nothing() -> None:
    model = a_model(switched=False)
    for arguments, said in [
        (("ptqq", 2), "view = 'ptqq'.*Did you mean 'ptq'"),
        (("ptq", NO_SUCH_BITS), f"bits = {NO_SUCH_BITS}"),
        (("fp", 4), "only 'ptq' takes others"),
        (("quantized",), "has not switched to QAT"),
    ]:
        with pytest.raises(UserError, match=said), view(model, *arguments):  # type: ignore[arg-type]
            pass
        assert {module.mode for _, module in fake_quant_modules(model)} == {"off"}
    with pytest.raises(UserError, match=r"no quantized layer.*prepare"), view(TinyModel(), "fp"):
        pass
