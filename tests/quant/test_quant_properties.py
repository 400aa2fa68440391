"""What must hold for any weights and any scale."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from qatscale.quant.bit_widths import SCALE_FLOOR, get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.reference import encode
from qatscale.quant.scales import initial_scale, ptq_scale
from tests.quant.quant_reference import BITS, CODES, LEVELS, value_and_slopes

bit_widths = st.sampled_from(BITS)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
scales = st.floats(1e-7, 1e3)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """[rows, 8], of any size of magnitude, with zeros, ties and repeated values likely."""
    rows = draw(st.integers(1, 3))
    value = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1.5, -2.5, 1e-30])
    return torch.tensor(draw(st.lists(st.lists(value, min_size=8, max_size=8), min_size=rows, max_size=rows)))


many = settings(max_examples=80)


@many
@given(weights(), scales, bit_widths, dtypes, st.sampled_from([None, 2, 4]))
def test_the_code_of_a_weight_is_its_level(w: Tensor, scale: float, bits: float, dtype: torch.dtype, size: int):
    quantizer = get_quantizer(bits)
    w = w.to(dtype)
    shape = (w.shape[0],) if size is None else (w.shape[0], 8 // size)
    alpha = torch.full(shape, scale)
    codes = encode(quantizer, w, alpha)
    assert codes.dtype == torch.int8
    assert set(codes.unique().tolist()) <= set(CODES[bits])
    levels = (codes.double() + quantizer.shift) / quantizer.steps
    expected = levels * alpha.double().clamp_min(SCALE_FLOOR).repeat_interleave(size or 8, -1).view(len(w), -1)
    found = fake_quantize(quantizer, w, alpha)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@many
@given(weights(), scales, bit_widths, dtypes)
def test_quantizing_a_quantized_weight_gives_itself(w: Tensor, scale: float, bits: float, dtype: torch.dtype) -> None:
    """Every level lies well inside its own rounding interval: also after bf16 rounding, up to 8 bits."""
    quantizer = get_quantizer(bits)
    alpha = torch.full((w.shape[0],), scale)
    once = fake_quantize(quantizer, w.to(dtype), alpha)
    assert torch.equal(fake_quantize(quantizer, once, alpha), once)


@many
@given(weights(), scales, bit_widths)
def test_every_value_is_a_level(w: Tensor, scale: float, bits: float) -> None:
    w, alpha = w.double(), torch.full((w.shape[0],), scale, dtype=torch.float64)
    out = fake_quantize(get_quantizer(bits), w, alpha) / max(scale, SCALE_FLOOR)
    distance = (out.unsqueeze(-1) - torch.tensor(LEVELS[bits], dtype=torch.float64)).abs().amin(-1)
    assert distance.max() <= 1e-12 * 128


@many
@given(weights(), scales, bit_widths)
def test_float64_equals_the_reference_everywhere(w: Tensor, scale: float, bits: float) -> None:
    w = w.double().requires_grad_()
    alpha = torch.full((w.shape[0],), scale, dtype=torch.float64, requires_grad=True)
    out = fake_quantize(get_quantizer(bits), w, alpha)
    out.sum().backward()
    table = torch.tensor([[value_and_slopes(x, scale, bits) for x in row] for row in w.tolist()], dtype=torch.float64)
    torch.testing.assert_close(out.detach(), table[..., 0], rtol=1e-14, atol=0)
    assert torch.equal(w.grad, table[..., 1])
    torch.testing.assert_close(alpha.grad, table[..., 2].sum(-1), rtol=1e-9, atol=1e-9)


@many
@given(weights(), scales, bit_widths)
def test_order_is_kept(w: Tensor, scale: float, bits: float) -> None:
    ordered = w.flatten().sort().values.unsqueeze(0)
    out = fake_quantize(get_quantizer(bits), ordered, torch.tensor([scale]))
    assert (out.diff() >= 0).all()


@many
@given(weights(), bit_widths)
def test_ptq_is_never_worse_than_the_initial_scale(w: Tensor, bits: float) -> None:
    quantizer, w = get_quantizer(bits), w.double()

    def error(alpha: Tensor) -> Tensor:
        return (fake_quantize(quantizer, w, alpha) - w).square().sum(-1)

    assert (error(ptq_scale(quantizer, w)) <= error(initial_scale(quantizer, w))).all()
