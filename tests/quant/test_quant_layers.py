"""The layers against quantizing the full weight by hand; activation checkpointing; torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatscale.config.schema import QatConfig
from qatscale.model.head import Head
from qatscale.model.tensor_parallel import UNSPLIT
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.layers import FakeQuantEmbedding, FakeQuantHead, FakeQuantLinear
from qatscale.quant.plugin import PlainMasters, QatPlugin
from qatscale.quant.scales import initial_scale, ptq_scale
from tests.quant.quant_models import TinyModel, a_batch


def a_linear(bits: float = 2, group_size: int | None = None, bias: bool = False) -> FakeQuantLinear:
    torch.manual_seed(3)
    layer = FakeQuantLinear.convert(nn.Linear(16, 6, bias=bias), bits, group_size=group_size)
    layer.weight_scale.data = initial_scale(layer.quantizer, layer.weight, group_size) * 0.7
    return layer


def an_embedding(bits: float = 4, group_size: int | None = None, **options: object) -> FakeQuantEmbedding:
    torch.manual_seed(4)
    layer = FakeQuantEmbedding.convert(nn.Embedding(20, 16, **options), bits, group_size=group_size)
    layer.weight_scale.data = initial_scale(layer.quantizer, layer.weight, group_size) * 0.7
    return layer


def test_conversion_keeps_the_module_its_parameters_its_hooks_and_the_generator() -> None:
    plain = nn.Linear(16, 6)
    weight, bias, seen = plain.weight, plain.bias, []
    plain.register_forward_hook(lambda *_: seen.append(1))
    before = torch.get_rng_state()
    layer = FakeQuantLinear.convert(plain, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer is plain
    assert layer.weight is weight
    assert layer.bias is bias
    layer(torch.ones(1, 16))
    assert seen == [1]
    assert isinstance(layer, nn.Linear)
    assert layer.weight_scale.tolist() == [1.0] * 6
    assert layer.weight_scale.dtype == torch.float32
    assert layer.weight_scale.requires_grad
    assert "bits=4" in repr(layer)
    assert "mode=off" in repr(layer)


@pytest.mark.parametrize("group_size", [None, 8])
def test_off_is_the_plain_layer_to_the_bit_and_leaves_the_scale_alone(group_size: int | None) -> None:
    linear, embedding = a_linear(bias=True, group_size=group_size), an_embedding(group_size=group_size)
    x, ids = torch.randn(5, 16), torch.tensor([[1, 2], [19, 2]])
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    assert torch.equal(embedding(ids), F.embedding(ids, embedding.weight))
    (linear(x).sum() + embedding(ids).sum()).backward()
    assert linear.weight_scale.grad is None
    assert embedding.weight_scale.grad is None


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
@pytest.mark.parametrize("group_size", [None, 8])
def test_learned_linear_is_linear_with_the_quantized_weight(bits: float, group_size: int | None) -> None:
    layer, x = a_linear(bits, group_size, bias=True), torch.randn(5, 16)
    layer.mode = "learned"
    upstream = torch.randn(5, 6)
    layer(x).backward(upstream)

    w, alpha = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.weight_scale))
    quantizer = get_quantizer(bits)
    F.linear(x, fake_quantize(quantizer, w, alpha, quantizer.grad_factor(6 * 16)), layer.bias).backward(upstream)
    assert torch.equal(layer.weight.grad, w.grad)
    assert torch.equal(layer.weight_scale.grad, alpha.grad)
    assert layer.weight_scale.grad.abs().min() > 0


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding_rows_equal_quantizing_the_whole_table(group_size: int | None, options: dict[str, object]) -> None:
    layer = an_embedding(4, group_size, **options).double()
    layer.mode = "learned"
    ids = torch.tensor([[1, 2, 2, 7], [7, 7, 19, 0]])  # with repeats, and with rows that do not occur
    upstream = torch.randn(2, 4, 16, dtype=torch.float64)
    found = layer(ids)
    found.backward(upstream)

    w, alpha = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.weight_scale))
    table = fake_quantize(layer.quantizer, w, alpha)
    # The straight-through gradients as arithmetic on the table, with the lookup's own padding and frequency rules.
    leaf = table.detach().requires_grad_()
    expected = F.embedding(ids, leaf, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    expected.backward(upstream)
    table.backward(leaf.grad)
    assert torch.equal(found, expected)
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer.weight_scale.grad, layer.grad_factor * alpha.grad, rtol=1e-12, atol=1e-14)
    assert layer.grad_factor == (20 * 16 * 7) ** -0.5, "g counts the whole table and not the rows looked up"
    assert layer.weight_scale.grad[5].abs().sum() == 0


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
@pytest.mark.parametrize("group_size", [None, 8])
def test_a_heads_loss_and_logits_are_those_of_its_quantized_weight(bits: float, group_size: int | None) -> None:
    """In every mode, with the gradients of weight and scale."""
    torch.manual_seed(5)
    head = FakeQuantHead.convert(Head(16, 20, UNSPLIT), bits, group_size=group_size)
    head.weight_scale.data = initial_scale(head.quantizer, head.weight, group_size) * 0.7
    x, labels = torch.randn(2, 5, 16), torch.randint(20, (2, 5))

    def expect(weight: Tensor) -> Tensor:
        torch.testing.assert_close(head(x), F.linear(x, weight))
        loss = F.cross_entropy(F.linear(x, weight).flatten(0, 1), labels.flatten())
        torch.testing.assert_close(head(x, labels), loss)
        return loss

    expect(head.weight)
    head.mode = "learned"
    w, alpha = (p.detach().clone().requires_grad_() for p in (head.weight, head.weight_scale))
    expect(fake_quantize(head.quantizer, w, alpha, head.quantizer.grad_factor(20 * 16))).backward()
    head(x, labels).backward()
    torch.testing.assert_close(head.weight.grad, w.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(head.weight_scale.grad, alpha.grad, rtol=1e-5, atol=1e-7)
    head.mode = "dynamic"
    expect(fake_quantize(head.quantizer, w, ptq_scale(head.quantizer, w, group_size)))


def test_an_empty_lookup() -> None:
    layer = an_embedding(group_size=4)
    layer.mode = "learned"
    out = layer(torch.empty(0, 3, dtype=torch.long))
    assert out.shape == (0, 3, 16)
    out.sum().backward()


def test_dynamic_finds_its_scale_and_gives_no_gradient() -> None:
    linear, embedding, x = a_linear(2), an_embedding(4), torch.randn(5, 16)
    for layer, inputs in ((linear, x), (embedding, torch.tensor([3, 3, 0]))):
        weight, quantizer = layer.weight.detach(), layer.quantizer
        expected = fake_quantize(quantizer, weight, ptq_scale(quantizer, weight))
        layer.mode = "dynamic"
        out = layer(inputs)
        assert not out.requires_grad
        want = F.linear(x, expected) if layer is linear else F.embedding(inputs, expected)
        assert torch.equal(out, want)


def test_dynamic_follows_new_weights_when_the_mode_is_set_again() -> None:
    layer, x = a_linear(2), torch.randn(5, 16)
    layer.mode = "dynamic"
    first = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.mode = "dynamic"
    torch.testing.assert_close(layer(x), 2 * first)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="learned"):
        a_linear().mode = "on"  # type: ignore[assignment]


def a_switched_model(recompute: bool = False, **qat: object) -> TinyModel:
    model = TinyModel(recompute=recompute)
    plugin = QatPlugin(QatConfig(scheme="scratch", **qat), 0)
    plugin.prepare(model)
    assert plugin.maybe_switch(0, PlainMasters(torch.optim.AdamW(model.parameters()))) is not None
    return model


def gradients(model: nn.Module, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(*batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("group_size", [None, 16])
def test_activation_checkpointing_changes_nothing(group_size: int | None) -> None:
    batch = a_batch()
    loss, grads = gradients(a_switched_model(bits=2, group_size=group_size), *batch)
    again, regrads = gradients(a_switched_model(recompute=True, bits=2, group_size=group_size), *batch)
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        assert torch.equal(regrads[name], grad), name


@pytest.mark.parametrize("bits", [1, 1.58, 2])
def test_a_compiled_block_equals_the_eager_one(bits: float) -> None:
    """Captured in one graph, without a break at the quantizer; `aot_eager` adds no rounding of a compiler's own."""
    eager = a_switched_model(bits=bits)
    compiled = copy.deepcopy(eager)
    for index, block in enumerate(compiled.blocks):
        compiled.blocks[index] = torch.compile(block, fullgraph=True, backend="aot_eager")
    batch = a_batch()
    loss, grads = gradients(eager, *batch)
    again, regrads = gradients(compiled, *batch)
    torch.testing.assert_close(again, loss)
    for name, grad in grads.items():
        found = {key.replace("_orig_mod.", ""): value for key, value in regrads.items()}[name]
        torch.testing.assert_close(found, grad, msg=name)


def test_a_compiled_block_follows_the_switch() -> None:
    layer, x = a_linear(2), torch.randn(5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight))
    layer.mode = "learned"
    quantized = fake_quantize(layer.quantizer, layer.weight, layer.weight_scale)
    torch.testing.assert_close(compiled(x), F.linear(x, quantized))
    compiled = torch.compile(layer, backend="aot_eager")  # the search for a scale stays out of the graph
    for bits in (2, 3, 4):
        layer.dynamic_quantizer = get_quantizer(bits)
        layer.mode = "dynamic"
        torch.testing.assert_close(compiled(x), layer(x))


def test_bf16_layers() -> None:
    layer = a_linear(2).bfloat16()
    layer.mode = "learned"
    out = layer(torch.randn(5, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype == layer.weight_scale.grad.dtype == torch.bfloat16


def test_autocast_keeps_fp32_weights_and_scales() -> None:
    layer = a_linear(2)
    layer.mode = "learned"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(5, 16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.dtype == layer.weight_scale.grad.dtype == torch.float32
