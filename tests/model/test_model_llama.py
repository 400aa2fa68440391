"""The forward and backward pass of the model against closed forms and against itself in other modes."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from qatscale.config.sizes import count_parameters
from qatscale.model.initial_weights import initialise
from qatscale.model.llama import Llama, parameter_shapes, rotate, rotation_tables
from tests.model.model_shrunken import CONFIGS


def grads(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_parameter_shapes_are_those_of_the_count(config):
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == count_parameters(config)
    assert set(Llama(config).state_dict()) - set(parameter_shapes(config)) <= {"head.weight"}  # no buffers


def test_rotation_tables_equal_float64():
    theta, channels, length = 10_000.0, 64, 4096
    cos, sin = rotation_tables(length, channels, theta)
    pair = torch.arange(channels // 2, dtype=torch.float64)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), theta ** (-2 * pair / channels))
    # the angle is rounded to fp32: up to 4,095 radians, with a rate and a product that are off by an ulp or two
    off = length * 4 * 2.0**-24
    torch.testing.assert_close(cos[:, 0].double(), torch.cat((angle, angle), 1).cos(), rtol=0, atol=off)
    torch.testing.assert_close(sin[:, 0].double(), torch.cat((-angle.sin(), angle.sin()), 1), rtol=0, atol=off)


def test_rotation_turns_each_pair_and_scores_depend_on_distance_alone():
    d, t = 16, 40
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, d, generator=generator, dtype=torch.float64).float()
    tables = rotation_tables(t, d, 100.0)
    turned_q = rotate(q.expand(1, t, 1, d), tables)[0, :, 0].double()
    turned_k = rotate(k.expand(1, t, 1, d), tables)[0, :, 0].double()
    as_complex = torch.complex(q[: d // 2].double(), q[d // 2 :].double())
    rate = 100.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    expected = as_complex * torch.exp(1j * torch.outer(torch.arange(t, dtype=torch.float64), rate))
    torch.testing.assert_close(turned_q, torch.cat((expected.real, expected.imag), 1), rtol=0, atol=2e-5)
    scores = turned_q @ turned_k.T
    for distance in (-11, 0, 3, 29):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=0, atol=2e-4)
    assert (scores.diagonal(0)[0] - scores.diagonal(3)[0]).abs() > 0.1


def test_rotation_keeps_its_precision_in_bf16():
    """After a cast of the model, q and k turn as in fp32 and are rounded once, also at far positions."""
    d, t = 64, 4096
    x = torch.randn(1, t, 1, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rotation_tables(t, d, 10_000.0)
    in_fp32 = rotate(x.float(), tables)
    assert torch.equal(rotate(x, tables), in_fp32.bfloat16())
    cos, sin = (table.bfloat16().float() for table in tables)  # what a bf16 buffer would hold
    assert (in_fp32 - rotate(x.float(), (cos, sin))).abs().max() > 2**-8


@pytest.mark.parametrize("cast", ["to", "bfloat16"])
def test_bf16_model_stays_near_fp32_at_far_positions(build, batch, cast):
    """Logits of a bf16 model are off by a few bf16 roundings at position 3,000 as at position 10, no more."""
    config = CONFIGS["gqa-tied"]
    model = build(config)
    tokens, _ = batch(config, 1, 3000)
    low = copy.deepcopy(model)
    low = low.to(torch.bfloat16) if cast == "to" else low.bfloat16()
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        off = (model(tokens) - low(tokens).float()).square().mean(-1).sqrt()[0]
        scale = model(tokens).square().mean().sqrt()
    assert off[-200:].mean() < 1.5 * off[:200].mean()
    assert off.mean() < 8 * 2**-8 * scale  # 2 layers x 4 roundings of relative size 2^-8 in the residual stream


def test_no_position_sees_a_later_token(build, batch):
    config = CONFIGS["gqa-tied"]
    model = build(config)
    tokens, _ = batch(config, 1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :7], after[0, :7], rtol=0, atol=0)
    assert ((before[0, 7:] - after[0, 7:]).abs().amax(-1) > 1e-3).all()


def test_loss_is_the_mean_cross_entropy_of_the_logits(config, build, batch):
    model = build(config)
    tokens, labels = batch(config)
    logits = model(tokens).double()
    expected = -torch.log_softmax(logits, -1).gather(-1, labels[..., None]).mean()
    loss = model(tokens, labels)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert abs(loss.item() - expected.item()) < 1e-6 * expected.item()


def test_gradient_is_the_slope_of_the_loss(config, build, batch):
    """Going along the gradient, the loss rises by its norm: central difference, whose error is second order."""
    model = build(config)
    tokens, labels = batch(config)
    model(tokens, labels).backward()
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads(model).values()))
    step, losses = 2e-3, []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, grad in zip(moved.parameters(), grads(model).values(), strict=True):
                parameter += sign * step / norm * grad
            losses.append(moved(tokens, labels).item())
    assert norm > 0.5
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit_and_recomputes_each_block(config, build, batch, dtype):
    tokens, labels = batch(config)
    results, calls = [], []
    for recompute in (False, True):
        model = build(config, activation_checkpointing=recompute).to(dtype)
        count = []
        for block in model.blocks:
            block.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        loss = model(tokens, labels)
        loss.backward()
        results.append((loss, grads(model)))
        calls.append(len(count))
    assert calls == [config.layers, 2 * config.layers]
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_compiled_model_is_one_graph_with_the_same_loss_and_gradients(build, batch):
    config = CONFIGS["gqa-tied"]
    tokens, labels = batch(config)
    model = build(config)
    loss = model(tokens, labels)
    loss.backward()
    expected = grads(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    again = compiled(tokens, labels)
    again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_built_on_meta_and_emptied_it_is_the_same_model(config, batch):
    straight = Llama(config)
    initialise(straight, 3)
    with torch.device("meta"):
        late = Llama(config)
    assert late(torch.zeros(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, config.vocab_size)
    late.to_empty(device="cpu")
    assert (late.head.weight is late.embed.weight) == config.tied_embedding
    with torch.device("meta"):  # whatever the default device is
        initialise(late, 3)
    tokens, labels = batch(config)
    assert torch.equal(straight(tokens, labels), late(tokens, labels))


def test_an_untied_tied_model_does_not_run(batch):
    config = CONFIGS["mha-tied"]
    model = Llama(config)
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)  # unties
    with pytest.raises(AssertionError, match="tie"):
        model(batch(config)[0])
