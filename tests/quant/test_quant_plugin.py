"""prepare, the switch and the state; and that none of them can fail silently."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from qatlaw.effective_bits import llama_weights
from qatscale.config.schema import QatConfig
from qatscale.errors import UserError
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.layers import FakeQuantEmbedding, FakeQuantLinear
from qatscale.quant.plugin import NothingQuantizedError, PlainMasters, QatPlugin, scale_groups
from qatscale.quant.scales import initial_scale
from qatscale.quant.selection import fake_quant_modules
from tests.quant.quant_models import TinyModel, a_batch, prepared

NAMES = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"]
LAYERS = [f"blocks.{index}.{name}" for index in range(2) for name in NAMES]


def train(model: TinyModel, optimizer: torch.optim.Optimizer, steps: int) -> float:
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(*a_batch(seed=step))
        loss.backward()
        optimizer.step()
    return loss.item()


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


def test_the_switch_comes_once_at_its_step() -> None:
    model, plugin, _, masters = prepared(3)
    assert [plugin.maybe_switch(step, masters) for step in (0, 1, 2)] == [None] * 3
    assert {module.mode for _, module in fake_quant_modules(model)} == {"off"}
    report = plugin.maybe_switch(3, masters)
    assert report is not None
    assert report.step == plugin.switched_at == 3
    assert {module.mode for _, module in fake_quant_modules(model)} == {"learned"}
    assert plugin.maybe_switch(3, masters) is None
    assert plugin.maybe_switch(4, masters) is None


def test_a_late_call_still_switches_and_full_precision_never_does() -> None:
    _, plugin, _, masters = prepared(3)
    report = plugin.maybe_switch(10, masters)
    assert report is not None
    assert report.step == 10
    model, plugin, _, masters = prepared(None, scheme="fp")
    assert plugin.maybe_switch(10**9, masters) is None
    assert {module.mode for _, module in fake_quant_modules(model)} == {"off"}


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
@pytest.mark.parametrize("group_size", [None, 16])
def test_scales_are_set_from_the_weights(bits: float, group_size: int | None) -> None:
    model, plugin, optimizer, masters = prepared(2, bits=bits, group_size=group_size)
    train(model, optimizer, 2)
    plugin.maybe_switch(2, masters)
    for name, module in fake_quant_modules(model):
        quantizer = get_quantizer(max(4, bits) if name in ("embed", "head") else bits)
        assert torch.equal(module.weight_scale, initial_scale(quantizer, module.weight, group_size)), name


class Bf16Masters:
    """fp32 masters beside bf16 parameters, as a mixed-precision engine keeps them."""

    def __init__(self, model: nn.Module) -> None:
        self.masters = {id(p): p.detach().float() for p in model.parameters()}
        self.reset: list[list[int]] = []
        model.to(torch.bfloat16)

    def full(self, parameter: nn.Parameter) -> Tensor:
        return self.masters[id(parameter)]

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        assert value.dtype == torch.float32
        self.masters[id(parameter)] = value.clone()
        parameter.data.copy_(value)

    def reset_state(self, parameters: Iterable[nn.Parameter]) -> None:
        self.reset.append([id(p) for p in parameters])


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
def test_bf16_scales_come_from_fp32_masters_and_groups_are_reset_whole(bits: int, optimizer_state: str) -> None:
    model, plugin, *_ = prepared(0, bits=bits, optimizer_state=optimizer_state)
    masters = Bf16Masters(model)
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    layer = model.blocks[0].attention.q
    exact = initial_scale(get_quantizer(bits), masters.full(layer.weight), dtype=torch.bfloat16)
    assert torch.equal(masters.full(layer.weight_scale), exact)
    assert torch.equal(layer.weight_scale, exact.bfloat16())
    if bits == 1:
        of_working = layer.weight.detach().float().abs().mean(-1)
        assert not torch.equal(exact, of_working), "the example can tell masters from bf16"
    assert report.modules[1].scale_bits == 16

    groups = [[id(p) for p in group] for group in scale_groups(model).values()]
    of_scales = {p for group in groups for p in group}
    weights = [id(p) for p in model.parameters() if id(p) not in of_scales]
    assert masters.reset == (groups if optimizer_state == "keep" else [*groups, weights])


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
def test_adams_state_at_the_switch(optimizer_state: str) -> None:
    model, plugin, optimizer, masters = prepared(2, bits=2, optimizer_state=optimizer_state)
    train(model, optimizer, 2)
    # What an engine that gives every parameter a gradient leaves behind for inert scales: a step count.
    for group in scale_groups(model).values():
        for scale in group:
            optimizer.state[scale] = {
                "step": torch.tensor(2.0), "exp_avg": torch.ones_like(scale), "exp_avg_sq": torch.ones_like(scale),
            }  # fmt: skip
    kept = copy.deepcopy(optimizer.state[model.norm.weight])
    plugin.maybe_switch(2, masters)
    for group in scale_groups(model).values():
        for scale in group:
            assert all(value.abs().sum() == 0 for value in optimizer.state[scale].values())
    for key, value in optimizer.state[model.norm.weight].items():
        assert torch.equal(value, kept[key] if optimizer_state == "keep" else torch.zeros_like(value)), key
    if optimizer_state == "keep":
        assert all(value.abs().sum() > 0 for value in kept.values())


def test_scales_outside_the_optimizer_are_an_error() -> None:
    model, plugin, *_ = prepared(0)
    optimizer = torch.optim.AdamW([model.norm.weight])
    with pytest.raises(ValueError, match="in no group of the optimizer"):
        plugin.maybe_switch(0, PlainMasters(optimizer))


def test_plain_masters_zero_an_integer_step_and_check_shapes() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"step": 5, "exp_avg": torch.ones(3)}
    masters = PlainMasters(optimizer)
    masters.reset_state([parameter])
    assert optimizer.state[parameter]["step"] == 0
    assert optimizer.state[parameter]["exp_avg"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="shape"):
        masters.assign(parameter, torch.ones(1))


def test_a_switch_that_changes_nothing_is_an_error() -> None:
    model, plugin, _, masters = prepared(0, tied=False, bits=4)
    with torch.no_grad():
        for _, module in fake_quant_modules(model):
            module.weight.copy_(torch.randint(-7, 8, module.weight.shape).float())
            module.weight[:, 0] = 7.0  # every row has max|w| = 7 = Qp, so that α = 1 and whole numbers are levels
    with pytest.raises(NothingQuantizedError, match="changes none of 14 weight matrices"):
        plugin.maybe_switch(0, masters)


def test_a_layer_that_was_replaced_after_prepare_is_an_error() -> None:
    """Adapters and kernels replace layers; such a layer would train in full precision without a word."""
    model, plugin, _, masters = prepared(0, bits=2)
    model.blocks[0].mlp.up = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(NothingQuantizedError, match=r"does not reach 1 of 16 layers: blocks\.0\.mlp\.up"):
        plugin.maybe_switch(0, masters)


@pytest.mark.parametrize("layer", [torch.nn.Linear(32, 96, bias=False), torch.nn.Bilinear(4, 4, 4)])
def test_a_matrix_whose_name_no_rule_knows_is_an_error_unless_it_is_kept(layer: torch.nn.Module) -> None:
    """A model with fused q, k and v would be quantized in its other layers alone."""
    qat = QatConfig(scheme="fused", bits=2)
    model = TinyModel()
    model.blocks[1].qkv = layer
    with pytest.raises(UserError, match=r"model\.blocks\.1\.qkv: 1 layer, .*exclude=\['qkv'\]"):
        QatPlugin(qat, 0).prepare(model)
    for exclude in ("qkv", "blocks.1.qkv", "*.q?v"):
        QatPlugin(qat, 0, exclude=[exclude]).prepare(model)


def test_a_report_that_differs_from_the_plan_is_an_error() -> None:
    _, plugin, _, masters = prepared(0, bits=2)
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    shape = {"hidden_size": 32, "layers": 2, "intermediate_size": 48, "vocabulary": 40}
    report.check(llama_weights(**shape, bits=2))
    assert report.params == llama_weights(**shape, bits=2).params
    for wrong in ({"bits": 4}, {"bits": 2, "group_size": 16}, {"bits": 2, "embedding_bits": 16}):
        with pytest.raises(NothingQuantizedError, match="and the recipe plans"):
            report.check(llama_weights(**shape, **wrong))


def test_weights_that_are_not_finite_are_an_error() -> None:
    model, plugin, _, masters = prepared(0)
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.mlp\.down\.weight"):
        plugin.maybe_switch(0, masters)


# ---- after the switch ----


def test_scales_move_and_a_still_one_is_an_error() -> None:
    model, plugin, optimizer, masters = prepared(0, bits=2)
    with pytest.raises(NothingQuantizedError, match="has not switched"):
        plugin.check_moving(masters)
    plugin.maybe_switch(0, masters)
    with pytest.raises(NothingQuantizedError, match="16 of 16 layers"):
        plugin.check_moving(masters)
    frozen = model.blocks[1].attention.k.weight_scale
    frozen.requires_grad_(False)
    train(model, optimizer, 2)
    with pytest.raises(NothingQuantizedError, match=r"1 of 16 layers .* 0: blocks\.1\.attention\.k\. Are they in"):
        plugin.check_moving(masters)
    frozen.requires_grad_(True)
    train(model, optimizer, 1)
    plugin.check_moving(masters)


def test_state_survives_json_on_both_sides_of_the_switch() -> None:
    model, plugin, optimizer, masters = prepared(2, bits=2)
    early = json.loads(json.dumps(plugin.state()))
    train(model, optimizer, 2)
    plugin.maybe_switch(2, masters)
    late = json.loads(json.dumps(plugin.state()))
    weights = copy.deepcopy(model.state_dict())
    expected = model(*a_batch()).item()

    resumed, again, _, resumed_masters = prepared(2, bits=2)
    again.load_state(early)
    assert again.switched_at is None
    assert {module.mode for _, module in fake_quant_modules(resumed)} == {"off"}
    resumed.load_state_dict(weights)
    again.load_state(late)
    assert again.switched_at == 2
    assert resumed(*a_batch()).item() == expected
    assert again.maybe_switch(5, resumed_masters) is None, "a resumed run does not switch twice"
    with pytest.raises(NothingQuantizedError, match="16 of 16"):
        again.check_moving(resumed_masters)
    again.load_state(early)
    assert {module.mode for _, module in fake_quant_modules(resumed)} == {"off"}


def test_bits_may_change_before_the_switch_and_not_after() -> None:
    _, plugin, _, masters = prepared(0, bits=2)
    before = plugin.state()
    plugin.maybe_switch(0, masters)
    after = plugin.state()
    for qat in ({"bits": 4}, {"bits": 2, "group_size": 16}):
        _, other, _, _ = prepared(5, **qat)
        other.load_state(before)
        with pytest.raises(UserError, match="switched to QAT at step 0 with"):
            other.load_state(after)


def test_layer_types_are_the_plain_ones_underneath() -> None:
    model, *_ = prepared()
    assert type(model.head) is FakeQuantLinear
    assert type(model.embed) is FakeQuantEmbedding
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.embed, nn.Embedding)
