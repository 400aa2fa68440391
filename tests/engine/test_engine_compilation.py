"""Compiled steps compute what plain ones do, and compile when they should."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qatscale.config.schema import EngineConfig, ModelConfig, QatConfig
from qatscale.engine.compilation import Compilation, plan_compilation
from qatscale.errors import UserError
from qatscale.model.head import chunk_loss, fusible_chunk_loss
from qatscale.model.initial_weights import initialise
from qatscale.model.llama import Llama
from qatscale.quant.plugin import QatPlugin
from qatscale.quant.scales import initial_scale
from qatscale.quant.selection import fake_quant_modules

CONFIG = ModelConfig(vocab_size=96, hidden_size=32, layers=3, heads=4, kv_heads=2, intermediate_size=64)
TOKENS = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(recompute: bool) -> Llama:
    model = Llama(CONFIG, recompute)
    initialise(model, seed=1)
    QatPlugin(QatConfig(scheme="fused", bits=2), 1).prepare(model)
    return model


def switch(model: Llama) -> None:
    for _, layer in fake_quant_modules(model):
        layer.weight_scale.data.copy_(initial_scale(layer.quantizer, layer.weight.detach()))
        layer.calibrated, layer.mode = True, "learned"


def step(model: Llama) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2e-5 * value.abs().max(), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_losses_and_gradients_through_the_switch_from_two_graphs_for_all_blocks(recompute: bool, backend: str) -> None:
    plain, compiled = build(recompute), build(recompute)
    names = list(compiled.state_dict())
    compilation = Compilation(compiled, "on", backend)
    assert_alike(step(compiled), step(plain))
    news = compilation.news()
    assert news is not None
    assert "1 graph, the same for all blocks" in news
    assert_alike(step(compiled), step(plain))
    assert compilation.news() is None
    for model in (plain, compiled):
        switch(model)
    assert_alike(step(compiled), step(plain))
    assert_alike(step(compiled), step(plain))
    news = compilation.news()
    assert news is not None
    assert news == "compiled anew 1 graph, the same for all blocks"
    assert list(compiled.state_dict()) == names


@pytest.mark.parametrize("recompute", [False, True])
def test_parts_without_weights_compute_the_same_and_do_not_change_at_the_switch(recompute: bool) -> None:
    plain, compiled = build(recompute), build(recompute)
    names = list(compiled.state_dict())
    compilation = Compilation(compiled, "parts", "aot_eager")
    assert_alike(step(compiled), step(plain))
    assert compilation.news() == "compiled 3 graphs of parts without weights", "q, k of fewer heads, and the MLP's gate"
    for model in (plain, compiled):
        switch(model)
    assert_alike(step(compiled), step(plain))
    with torch.no_grad():
        pair = [model(TOKENS[:3, :-1], TOKENS[:3, 1:]) for model in (plain, compiled)]
    assert torch.equal(*pair)
    assert compilation.news() is None
    assert list(compiled.state_dict()) == names


def test_validation_is_not_compiled_and_gives_the_plain_models_loss_to_the_bit() -> None:
    plain, compiled = build(False), build(False)
    compilation = Compilation(compiled, "on", "aot_eager")
    for rows in (4, 3, 1):
        with torch.no_grad():
            pair = [model(TOKENS[:rows, :-1], TOKENS[:rows, 1:]) for model in (plain, compiled)]
        assert torch.equal(*pair)
    assert compilation.news() is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_of_a_chunk_is_the_plain_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(64, 1000, generator=generator)).to(dtype)
    labels = torch.randint(1000, (64,), generator=generator)
    expected, expected_grad = chunk_loss(logits.clone(), labels, 0.5)
    found, grad = torch.compile(fusible_chunk_loss, dynamic=False)(logits.clone(), labels, 0.5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def decide(setting: str, stage: int, tensor: int = 1) -> str:
    engine = EngineConfig.model_validate({"compile": setting, "tensor_parallel": tensor})
    return plan_compilation(engine, {"zero_optimization": {"stage": stage}})


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [decide("on", 1), decide("on", 2), decide("on", 1, 2), decide("on", 3), decide("on", 3, 2)]
    assert asked == ["on", "on", "on", "parts", "parts"]
    assert decide("off", 1) == "off"
    assert decide("auto", 1) == "off", "on a CPU it takes longer than a small run gains"
    for triton, expected in ((True, ["on", "on", "parts", "parts"]), (False, ["off"] * 4)):
        monkeypatch.setattr("qatscale.engine.compilation.uses_gpu", lambda: True)
        monkeypatch.setattr("qatscale.engine.compilation._has_triton", lambda triton=triton: triton)
        assert [decide("auto", stage, tensor) for stage, tensor in ((1, 1), (2, 1), (3, 1), (1, 2))] == expected
    with pytest.raises(UserError, match="Triton"):
        decide("on", 3)
    assert Compilation(build(False), "off").news() is None
