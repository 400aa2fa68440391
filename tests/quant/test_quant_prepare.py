"""What `prepare` converts, what it refuses, and the groups of the scales."""

from __future__ import annotations

import pytest
import torch
from quant_models import LAYERS, TinyModel, a_batch, prepared
from torch import nn

from qatscale.config.schema import QatConfig
from qatscale.errors import UserError
from qatscale.quant.plugin import QatPlugin, scale_groups
from qatscale.quant.selection import fake_quant_modules

# ---- prepare ----


@pytest.mark.parametrize("tied", [True, False])
def test_prepare_converts_the_layers_of_the_contract_and_no_other(tied: bool) -> None:
    model = TinyModel(tied)
    before = dict(model.named_parameters())
    assert QatPlugin(QatConfig(scheme="scratch", bits=2), 0).prepare(model) is model
    found = dict(fake_quant_modules(model))
    assert list(found) == (["embed", *LAYERS, "head"] if tied else LAYERS)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert sorted(set(after) - set(before)) == sorted(f"{name}.weight_scale" for name in found if name != "head")
    assert all(after[name].requires_grad for name in after)
    assert {name: module.quantizer.bits for name, module in found.items() if "." in name} == dict.fromkeys(LAYERS, 2)
    if tied:
        assert model.head.weight_scale is model.embed.weight_scale
        assert model.embed.quantizer.bits == model.head.quantizer.bits == 4


def test_prepare_changes_no_output() -> None:
    plain, model = TinyModel(), TinyModel()
    QatPlugin(QatConfig(scheme="fused", bits=1), 5).prepare(model)
    tokens, _ = a_batch()
    assert torch.equal(model.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize(
    ("tied", "bits", "embedding_bits", "expected"),
    [
        (True, 1, "auto", 4), (True, 4, "auto", 4), (True, 6, "auto", 6), (False, 2, "auto", None),
        (True, 2, 8, 8), (False, 2, 8, 8), (True, 2, 16, None), (False, 8, 4, 4),
    ],
)  # fmt: skip
def test_embedding_bits(tied: bool, bits: float, embedding_bits: object, expected: int | None) -> None:
    model, plugin, _, masters = prepared(0, tied, bits=bits, embedding_bits=embedding_bits)
    found = {name: module.quantizer.bits for name, module in fake_quant_modules(model) if "." not in name}
    assert found == ({} if expected is None else {"embed": expected, "head": expected})
    if expected and not tied:
        assert model.embed.weight_scale is not model.head.weight_scale
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    reason = ("untied" if embedding_bits == "auto" else "embedding_bits = 16") + ": stays in full precision"
    assert report.left_out == ({} if expected else dict.fromkeys(["embed", "head"], reason))


def test_prepare_twice_changes_nothing() -> None:
    model, plugin, _, masters = prepared(0, bits=2)
    plugin.maybe_switch(0, masters)
    before = dict(model.named_parameters())
    modes = {name: module.mode for name, module in fake_quant_modules(model)}
    plugin.prepare(model)
    QatPlugin(QatConfig(scheme="fused", bits=2), 7).prepare(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {name: module.mode for name, module in fake_quant_modules(model)} == modes


@pytest.mark.parametrize(
    ("qat", "said"),
    [
        ({"bits": 4}, "prepared at 2 bits, group size None.*4 bits, group size None"),
        ({"bits": 2, "group_size": 16}, "prepared at 4 bits, group size None.*4 bits, group size 16"),
        ({"bits": 2, "embedding_bits": 16}, "model.embed.*not one that this recipe quantizes"),
    ],
)
def test_a_model_prepared_otherwise_is_an_error(qat: dict[str, object], said: str) -> None:
    model, *_ = prepared(bits=2)
    with pytest.raises(UserError, match=said):
        QatPlugin(QatConfig(scheme="fused", **qat), 1).prepare(model)


def test_group_size_gives_a_scale_per_group() -> None:
    model, *_ = prepared(bits=4, group_size=16)
    assert model.blocks[0].mlp.gate.weight_scale.shape == (48, 2)
    assert model.blocks[0].mlp.down.weight_scale.shape == (32, 3)
    assert model.embed.weight_scale.shape == (40, 2)


@pytest.mark.parametrize(("size", "layer", "channels"), [(24, "embed", 32), (32, "blocks.0.mlp.down", 48)])
def test_a_group_size_that_does_not_divide_is_an_error_with_sizes(size: int, layer: str, channels: int) -> None:
    with pytest.raises(UserError) as error:
        prepared(group_size=size)
    text = str(error.value)
    assert f"qat.group_size = {size}: does not divide the {channels} input channels of {layer}." in text
    assert "divide every quantized layer here: 1, 2, 4, 8, 16." in text


def test_a_model_without_matching_layers_is_an_error() -> None:
    with pytest.raises(UserError, match=r"Sequential.*q, k, v, o, gate, up, down.*this model has 0"):
        QatPlugin(QatConfig(scheme="scratch"), 0).prepare(nn.Sequential(nn.Linear(4, 4)))
    only_embedding = nn.ModuleDict({"embed": nn.Embedding(4, 4)})
    with pytest.raises(UserError, match="needs Linear layers named"):
        QatPlugin(QatConfig(scheme="scratch", embedding_bits=4), 0).prepare(only_embedding)


def test_a_subclass_of_linear_is_an_error() -> None:
    class LowRankLinear(nn.Linear): ...

    model = TinyModel()
    model.blocks[1].attention.v = LowRankLinear(32, 32)
    with pytest.raises(UserError, match=r"blocks\.1\.attention\.v.*LowRankLinear.*plain nn.Linear"):
        QatPlugin(QatConfig(scheme="scratch"), 0).prepare(model)
    assert not list(fake_quant_modules(model)), "an error leaves the model as it was"


def test_a_weight_shared_with_an_unquantized_layer_is_an_error() -> None:
    model = TinyModel()
    model.output = nn.Linear(32, 40, bias=False)
    model.output.weight = model.embed.weight
    with pytest.raises(UserError, match=r"model\.output\.weight: is the same parameter as (head|embed)\.weight"):
        QatPlugin(QatConfig(scheme="scratch"), 0).prepare(model)


def test_partitioned_weights_and_special_embeddings_are_errors() -> None:
    model = TinyModel()
    model.blocks[0].attention.q.weight.ds_id = 3  # as deepspeed.zero.Init marks them
    with pytest.raises(UserError, match=r"before deepspeed\.initialize"):
        QatPlugin(QatConfig(scheme="scratch"), 0).prepare(model)
    model = TinyModel(tied=False)
    model.embed = nn.Embedding(40, 32, max_norm=1.0)
    with pytest.raises(UserError, match="max_norm"):
        QatPlugin(QatConfig(scheme="scratch", embedding_bits=8), 0).prepare(model)


def test_scheme_and_switch_step_agree() -> None:
    with pytest.raises(ValueError, match="does not go with scheme 'fp'"):
        QatPlugin(QatConfig(), 5)
    with pytest.raises(ValueError, match="does not go with scheme 'fused'"):
        QatPlugin(QatConfig(scheme="fused"), None)
    with pytest.raises(RuntimeError, match="prepare"):
        QatPlugin(QatConfig(scheme="scratch"), 0).state()


def test_scale_groups_and_their_learning_rates() -> None:
    model, plugin, *_ = prepared(bits=2)
    groups = scale_groups(model)
    assert list(groups) == [2, 4]
    assert [id(p) for p in groups[2]] == [id(dict(fake_quant_modules(model))[name].weight_scale) for name in LAYERS]
    assert [id(p) for p in groups[4]] == [id(model.embed.weight_scale)]
    assert [plugin.scale_lr_ratio(bits) for bits in (1, 2, 3, 4, 8)] == [0.1, 1, 1 / 3, 1 / 7, 1 / 127]
    assert QatPlugin(QatConfig(scale_lr_ratio=0.5), None).scale_lr_ratio(4) == 0.5


def test_the_gradient_factor_is_an_option() -> None:
    grads = []
    for use in (True, False):
        model, plugin, _, masters = prepared(0, bits=2, scale_gradient_factor=use)
        plugin.maybe_switch(0, masters)
        model(*a_batch()).backward()
        grads.append(model.blocks[0].mlp.up.weight_scale.grad)
    torch.testing.assert_close(grads[0], grads[1] / (48 * 32) ** 0.5)


# ---- the switch ----
