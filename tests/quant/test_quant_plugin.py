"""The switch, its report, its state; and that nothing of it can happen in silence."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable

import pytest
import torch
from quant_models import a_batch, prepared, train
from torch import Tensor, nn

from qatscale.errors import UserError
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.layers import FakeQuantEmbedding, FakeQuantLinear
from qatscale.quant.plugin import NothingQuantizedError, PlainMasters, scale_groups
from qatscale.quant.scales import initial_scale
from qatscale.quant.selection import fake_quant_modules


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


def test_weights_that_are_not_finite_are_an_error() -> None:
    model, plugin, _, masters = prepared(0)
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.mlp\.down\.weight"):
        plugin.maybe_switch(0, masters)


# ---- the report ----


def test_the_report_counts_what_was_quantized() -> None:
    model, plugin, _, masters = prepared(0, bits=2)
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    blocks, embed = 2 * (4 * 32 * 32 + 3 * 32 * 48), 40 * 32
    scales = 2 * (4 * 32 + 2 * 48 + 32)
    stored = 2 * blocks + 32 * scales + 4 * embed + 32 * 40  # fp32 scales
    assert report.layers == 16
    assert len(report.modules) == 15, "a tied embedding and head are one matrix"
    assert report.weights == blocks + embed
    assert report.bits_per_weight == pytest.approx(stored / (blocks + embed), rel=1e-15)
    assert report.bytes == stored // 8
    first = report.modules[0].to_dict()
    assert first["names"] == ["embed", "head"]
    assert (first["bits"], first["quantizer"], first["shape"], first["scales"]) == (4, "lsq", [40, 32], 40)
    assert first["bits_per_weight"] == 4 + 32 * 40 / (40 * 32)

    up = model.blocks[1].mlp.up
    error = up.weight - fake_quantize(up.quantizer, up.weight, up.weight_scale)
    found = {name: m.relative_error for m in report.modules for name in m.names}["blocks.1.mlp.up"]
    assert found == pytest.approx((error.norm() / up.weight.norm()).item(), rel=1e-6)
    squares = [(m.squared_error, m.squared_norm) for m in report.modules]
    assert report.relative_error == pytest.approx((sum(e for e, _ in squares) / sum(n for _, n in squares)) ** 0.5)

    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again == report.to_dict()
    text = str(report)
    for expected in ("16 layers", "embed = head", "seq", "lsq", "gate", f"{blocks + embed:,}"):
        assert expected in text, text


def test_ternary_is_stored_in_two_bits_and_zero_weights_are_reported() -> None:
    model, plugin, _, masters = prepared(0, tied=False, bits=1.58)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.zero_()
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    down = {name: m for m in report.modules for name in m.names}["blocks.0.mlp.down"]
    assert down.bits_per_weight == 2 + 32 * 32 / (32 * 48)
    assert down.relative_error == 0
    assert "in full precision: embed, head" in " ".join(str(report).split())

    model, plugin, _, masters = prepared(0, tied=False, bits=1)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.zero_()  # becomes +1e-5 everywhere
    report = plugin.maybe_switch(0, masters)
    assert report is not None
    json.dumps(report.to_dict(), allow_nan=False)
    assert {n: m.to_dict() for m in report.modules for n in m.names}["blocks.0.mlp.down"]["relative_error"] is None


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
