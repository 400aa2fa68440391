"""Quantizers against the table, one Python float at a time, and their gradients against finite differences."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from qatlaw.bit_widths import BIT_WIDTHS_TEXT
from qatscale.errors import UserError
from qatscale.quant.bit_widths import QUANTIZERS, get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.reference import encode
from qatscale.quant.scales import initial_scale, ptq_scale
from tests.quant.quant_reference import BITS, CODES, LEVELS, initial_alpha, qp_of, value_and_slopes
from tests.wrong_values import NO_SUCH_BITS

ROWS, CHANNELS = 5, 24


def a_weight(dtype: torch.dtype = torch.float64, rows: int = ROWS, channels: int = CHANNELS) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, channels, generator=generator, dtype=torch.float64).to(dtype)


def an_alpha(bits: float, w: Tensor, shrink: float = 0.6) -> Tensor:
    """Scales small enough that some weights fall outside the range of every quantizer."""
    return initial_scale(get_quantizer(bits), w) * torch.linspace(shrink, 1.1, w.shape[0], dtype=w.dtype)


def by_hand(w: Tensor, alpha: Tensor, bits: float) -> tuple[Tensor, Tensor, Tensor]:
    """w: [rows, channels], alpha: [rows] -> value and both slopes of every weight, float64."""
    table = [[value_and_slopes(x, a, bits) for x in row] for row, a in zip(w.tolist(), alpha.tolist(), strict=True)]
    value, slope_w, slope_alpha = torch.tensor(table, dtype=torch.float64).unbind(-1)
    return value, slope_w, slope_alpha


def run(bits: float, w: Tensor, alpha: Tensor, upstream: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized weight, dL/dw, dL/dα for L = sum(upstream * ŵ)."""
    w, alpha = w.detach().requires_grad_(), alpha.detach().requires_grad_()
    out = fake_quantize(get_quantizer(bits), w, alpha, factor)
    grad_w, grad_alpha = torch.autograd.grad(out, (w, alpha), upstream)
    return out.detach(), grad_w, grad_alpha


@pytest.mark.parametrize("bits", BITS)
def test_forward_and_gradients_are_the_tables(bits: float) -> None:
    w = a_weight()
    alpha = an_alpha(bits, w)
    upstream = a_weight().flip(0).cos()
    value, slope_w, slope_alpha = by_hand(w, alpha, bits)
    if bits > 1:
        assert 0 < slope_w.sum() < slope_w.numel(), "the example has weights on both sides of the range"

    out, grad_w, grad_alpha = run(bits, w, alpha, upstream, factor=0.25)

    torch.testing.assert_close(out, value, rtol=1e-15, atol=0)
    torch.testing.assert_close(grad_w, upstream * slope_w, rtol=0, atol=0)
    torch.testing.assert_close(grad_alpha, 0.25 * (upstream * slope_alpha).sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_straight_through_surrogate(bits: float) -> None:
    """Finite differences of the function whose derivative the straight-through estimator is.

    Inside the range ŵ = w + α·r, with the rounding residual r = q - v held; outside ŵ = α·(outermost level).
    For 1 bit ŵ has two surrogates: w for w and α·sign(w) for α.
    """
    w, h = a_weight(), 1e-6
    alpha = an_alpha(bits, w)
    outermost = {1.58: (-1, 1), 2: (-0.75, 0.75)}.get(bits) or (-(qp_of(bits) + 1), qp_of(bits))
    edge = {1.58: (-0.99, 0.99), 2: (-0.99, 0.99)}.get(bits) or outermost
    scale = alpha.unsqueeze(-1)
    v = w / scale
    residual = by_hand(w, alpha, bits)[0] / scale - v

    def surrogate(w: Tensor, scale: Tensor) -> Tensor:
        inside = w + scale * residual
        return torch.where(v < edge[0], scale * outermost[0], torch.where(v > edge[1], scale * outermost[1], inside))

    def for_weight(w: Tensor, scale: Tensor) -> Tensor:
        return w if bits == 1 else surrogate(w, scale)

    def for_scale(w: Tensor, scale: Tensor) -> Tensor:
        return scale * w.sign() if bits == 1 else surrogate(w, scale)

    upstream = a_weight().sin()
    _, grad_w, grad_alpha = run(bits, w, alpha, upstream)
    numeric_w = upstream * (for_weight(w + h, scale) - for_weight(w - h, scale)) / (2 * h)
    numeric_alpha = (upstream * (for_scale(w, scale + h) - for_scale(w, scale - h)) / (2 * h)).sum(-1)
    torch.testing.assert_close(grad_w, numeric_w, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_alpha, numeric_alpha, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_a_grid_across_the_range_takes_every_level_and_no_other(bits: float) -> None:
    quantizer = get_quantizer(bits)
    reach = 2.0 * max(1, qp_of(bits))
    w = torch.linspace(-reach, reach, 20_001, dtype=torch.float64).unsqueeze(0)
    alpha = torch.ones(1, dtype=torch.float64)
    out = fake_quantize(quantizer, w, alpha)
    assert out.unique().tolist() == pytest.approx(LEVELS[bits], rel=1e-15)
    assert encode(quantizer, w, alpha).unique().tolist() == CODES[bits]
    assert len(CODES[bits]) == {1: 2, 1.58: 3}.get(bits, 2**bits)


def test_binary_zero_is_plus_one() -> None:
    w = torch.tensor([[0.0, -0.0, 1e-30, -1e-30]], requires_grad=True)
    alpha = torch.tensor([0.5], requires_grad=True)
    out = fake_quantize(get_quantizer(1), w, alpha)
    assert out.tolist() == [[0.5, 0.5, 0.5, -0.5]]
    out.sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [2.0]


def test_ties_go_to_even() -> None:
    one = torch.ones(1)
    halves = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    assert fake_quantize(get_quantizer(3), halves, one).tolist() == [[-2, -2, 0, 0, 2, 2]]
    # 2v - .5 is 0.5, -0.5, -1.5 at v = 0.5, 0, -0.5: codes 0, 0, -2.
    assert fake_quantize(get_quantizer(2), torch.tensor([[0.5, 0.0, -0.5]]), one).tolist() == [[0.25, 0.25, -0.75]]
    # 1.5·v = ±0.5 at v = ±1/3, in float64 to the bit.
    thirds = torch.tensor([[0.5 / 1.5, -0.5 / 1.5]], dtype=torch.float64)
    assert (1.5 * thirds).abs().tolist() == [[0.5, 0.5]]
    assert encode(get_quantizer(1.58), thirds, one.double()).tolist() == [[0, 0]]


@pytest.mark.parametrize("bits", BITS[1:])
def test_the_range_is_closed(bits: float) -> None:
    """A weight exactly on the edge keeps its gradient; the next float64 beyond it does not."""
    edges = {1.58: (-0.99, 0.99), 2: (-0.99, 0.99)}.get(bits) or (-(qp_of(bits) + 1.0), qp_of(bits))
    beyond = [math.nextafter(edges[0], -math.inf), math.nextafter(edges[1], math.inf)]
    w = torch.tensor([[*edges, *beyond]], dtype=torch.float64)
    _, grad_w, _ = run(bits, w, torch.ones(1, dtype=torch.float64), torch.ones_like(w))
    assert grad_w.tolist() == [[1, 1, 0, 0]]


def test_at_one_bit_every_weight_trains_however_far_from_its_scale() -> None:
    w = torch.tensor([[-1e6, -1.0, -1e-9, 0.0, 0.5, 1e6]])
    for alpha in (0.0, 1e-3, 1.0):
        _, grad_w, _ = run(1, w, torch.full((1,), alpha), torch.ones_like(w))
        assert torch.equal(grad_w, torch.ones_like(w))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("alpha", [0.0, -3.0, 1e-7])
def test_a_scale_below_the_floor_acts_as_the_floor_and_still_gets_a_gradient(bits: float, alpha: float) -> None:
    w = a_weight(rows=1) * 1e-5
    upstream = torch.ones_like(w)
    floored = run(bits, w, torch.tensor([1e-5], dtype=torch.float64), upstream)
    found = run(bits, w, torch.tensor([alpha], dtype=torch.float64), upstream)
    for ours, expected in zip(found, floored, strict=True):
        assert torch.equal(ours, expected)
    assert found[2].item() != 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 4, 24])
def test_the_initial_scale(bits: float, group_size: int | None) -> None:
    w = a_weight()
    found = initial_scale(get_quantizer(bits), w, group_size)
    groups = w.unflatten(-1, (-1, group_size or CHANNELS))
    expected = torch.tensor([[initial_alpha(group, bits) for group in row] for row in groups.tolist()]).double()
    assert found.shape == ((ROWS,) if group_size is None else (ROWS, CHANNELS // group_size))
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_zeros_starts_at_the_floor(bits: float) -> None:
    assert initial_scale(get_quantizer(bits), torch.zeros(2, 8)).tolist() == pytest.approx([1e-5, 1e-5])
    assert torch.isfinite(ptq_scale(get_quantizer(bits), torch.zeros(2, 8))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [b for b in BITS if b > 1])
@pytest.mark.parametrize("group_size", [None, 8])
def test_no_weight_lies_beyond_the_outermost_level_at_the_switch(
    bits: float, group_size: int | None, dtype: torch.dtype
) -> None:
    """In the type that forward uses. w/(w/Qp) is Qp or, for some w, the number above Qp, which would be clipped: no
    gradient for the weight, and Qp instead of nothing for its scale. Runs that agree but for the last bit would part at
    the switch."""
    w = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    w[:, 3], w[:, 11] = 10 + w[:, 3].abs(), 10 + w[:, 11].abs()
    quantizer = get_quantizer(bits)
    alpha = initial_scale(quantizer, w, group_size, dtype)
    assert alpha.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(alpha, alpha.to(dtype).to(alpha.dtype)), "forward sees the master's very value"

    working = w.to(dtype)
    largest = working.unflatten(-1, (-1, group_size or 16)).abs().amax(-1).to(alpha.dtype).reshape(alpha.shape)
    naive = (largest / quantizer.qp).to(dtype).to(alpha.dtype)
    if not (quantizer.qp == 1 or (quantizer.qp == 3 and dtype in (torch.float32, torch.float64))):
        assert (largest / naive > quantizer.qp).any(), "the sample holds weights that rounding to nearest clips"
    assert (largest / alpha <= quantizer.qp).all()
    assert (alpha / naive - 1).abs().max() <= torch.finfo(dtype).eps
    if quantizer.name == "lsq":  # SEQ gives |v| > .99 no gradient, as released
        slope_w = run(bits, working, alpha.to(dtype), torch.ones_like(working))[1]
        assert slope_w.eq(1).all(), "every weight keeps its gradient"


@pytest.mark.parametrize("bits", BITS)
def test_grouped_is_the_same_as_each_group_a_row_of_its_own(bits: float) -> None:
    w, upstream = a_weight(), a_weight().tanh()
    rows = w.reshape(-1, 6)
    alpha = an_alpha(bits, rows)
    out, grad_w, grad_alpha = run(bits, rows, alpha, upstream.reshape(-1, 6))
    found = run(bits, w, alpha.reshape(ROWS, -1), upstream)
    assert torch.equal(found[0], out.reshape(w.shape))
    assert torch.equal(found[1], grad_w.reshape(w.shape))
    assert torch.equal(found[2], grad_alpha.reshape(ROWS, -1))


@pytest.mark.parametrize("bits", BITS)
def test_leading_dimensions_are_rows(bits: float) -> None:
    w = a_weight(rows=6)
    alpha = an_alpha(bits, w)
    flat = fake_quantize(get_quantizer(bits), w, alpha)
    stacked = fake_quantize(get_quantizer(bits), w.reshape(2, 3, -1), alpha.reshape(2, 3))
    assert torch.equal(stacked.reshape(w.shape), flat)


@pytest.mark.parametrize("bits", BITS)
def test_memory_layout_does_not_matter(bits: float) -> None:
    w = a_weight(torch.float32)
    alpha, upstream = an_alpha(bits, w), a_weight(torch.float32).sin()
    expected = run(bits, w, alpha, upstream)
    transposed = w.t().contiguous().t()
    assert not transposed.is_contiguous()
    found = run(bits, transposed, alpha, upstream.t().contiguous().t())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2])  # sums in another order


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_bf16_is_computed_in_fp32_and_rounded_once(bits: float, scale_dtype: torch.dtype) -> None:
    w = a_weight(torch.bfloat16)
    alpha = an_alpha(bits, w.float()).to(scale_dtype)
    upstream = a_weight(torch.bfloat16).sin()
    out, grad_w, grad_alpha = run(bits, w, alpha, upstream)
    wide, wide_w, wide_alpha = run(bits, w.float(), alpha.float(), upstream.float())
    assert (out.dtype, grad_w.dtype, grad_alpha.dtype) == (torch.bfloat16, torch.bfloat16, scale_dtype)
    assert torch.equal(out, wide.bfloat16())
    assert torch.equal(grad_w, wide_w.bfloat16())
    assert torch.equal(grad_alpha, wide_alpha.to(scale_dtype))


def test_nothing_but_weight_and_scale_is_kept_for_backward() -> None:
    w = a_weight(torch.float32).requires_grad_()
    alpha = an_alpha(2, w.detach()).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(get_quantizer(2), w, alpha)
    assert [t.data_ptr() for t in kept] == [w.data_ptr(), alpha.data_ptr()]


@pytest.mark.parametrize("bits", BITS)
def test_inputs_stay_as_they_are(bits: float) -> None:
    w, upstream = a_weight(torch.float32), a_weight(torch.float32).sin()
    alpha = an_alpha(bits, w)
    copies = [t.clone() for t in (w, alpha, upstream)]
    run(bits, w, alpha, upstream)
    encode(get_quantizer(bits), w, alpha)
    ptq_scale(get_quantizer(bits), w)
    for tensor, copy in zip((w, alpha, upstream), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("bits", BITS)
def test_a_frozen_input_gets_no_gradient(bits: float) -> None:
    w = a_weight()
    alpha = an_alpha(bits, w)
    _, grad_w, grad_alpha = run(bits, w, alpha, torch.ones_like(w))
    alone_w, alone_alpha = w.clone().requires_grad_(), alpha.clone().requires_grad_()
    fake_quantize(get_quantizer(bits), alone_w, alpha).sum().backward()
    fake_quantize(get_quantizer(bits), w, alone_alpha).sum().backward()
    assert torch.equal(alone_w.grad, grad_w)
    assert torch.equal(alone_alpha.grad, grad_alpha)


def test_grad_factor() -> None:
    """g = 1/sqrt(numel·Qp); Qp = 1 up to 2 bits, then 2^(bits-1) - 1."""
    for bits in BITS:
        assert get_quantizer(bits).grad_factor(4096) == pytest.approx(1 / math.sqrt(4096 * qp_of(bits)), rel=1e-15)


def test_storage_bits_hold_the_codes() -> None:
    for quantizer in QUANTIZERS.values():
        span = quantizer.qn + quantizer.qp + 1 if quantizer.name != "binary" else 2
        assert 2 ** (quantizer.storage_bits - 1) < span <= 2**quantizer.storage_bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 128])
def test_ptq_scale_is_near_the_best_and_never_worse_than_the_initial(bits: float, group_size: int | None) -> None:
    quantizer = get_quantizer(bits)
    w = a_weight(rows=16, channels=256)
    w[3] *= 1e-2
    w[4, 0] = 30.0  # an outlier, as real rows have

    def error(alpha: Tensor) -> Tensor:
        squares = (fake_quantize(quantizer, w, alpha) - w).square()
        return squares.unflatten(-1, (-1, group_size or 256)).sum(-1).reshape(alpha.shape)

    found, initial = error(ptq_scale(quantizer, w, group_size)), initial_scale(quantizer, w, group_size)
    assert (found <= error(initial)).all()
    brute = torch.stack([error(initial * r) for r in torch.linspace(0.05, 1.6, 1500, dtype=torch.float64)]).amin(0)
    assert (found / brute).mean() <= {8: 1.06}.get(bits, 1.02)
    if bits != 1:
        assert (found / error(initial)).mean() <= 0.98


@pytest.mark.parametrize(("bits", "best"), [(1, 1.0), (1.58, 1.5), (2, 4 / 3)])
def test_ptq_scale_of_equal_weights_puts_the_outermost_level_on_them(bits: float, best: float) -> None:
    """SEQ's outermost level is below α, so that its best α is above max|w|."""
    w = torch.tensor([[1.0, -1.0] * 32], dtype=torch.float64)
    assert ptq_scale(get_quantizer(bits), w).item() == pytest.approx(best, rel=0.01)


def test_ptq_scale_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    w = a_weight(torch.float32, rows=11)
    whole = ptq_scale(get_quantizer(3), w)
    monkeypatch.setattr("qatscale.quant.scales._PTQ_CHUNK", 2 * CHANNELS)
    assert torch.equal(ptq_scale(get_quantizer(3), w), whole)


def test_wrong_bits_and_shapes_are_errors() -> None:
    with pytest.raises(UserError, match=f"bits = {NO_SUCH_BITS}: .*{re.escape(BIT_WIDTHS_TEXT)}"):
        get_quantizer(NO_SUCH_BITS)
    for shape in [(3,), (5, 7), (1, 5), ()]:
        with pytest.raises(ValueError, match="does not fit"):
            fake_quantize(get_quantizer(4), torch.ones(5, 24), torch.ones(shape))
