"""The Triton kernels against the plain arithmetic: values and dL/dw to the bit, dL/dα to the rounding of its sum.

And the plain arithmetic against the table in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from qatscale.quant import reference
from qatscale.quant.bit_widths import SCALE_FLOOR, Quantizer, get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.scales import initial_scale
from tests.quant.quant_reference import BITS, value_and_slopes
from tests.quant.triton_interpreted import interpreted_kernels

Case = tuple[Tensor, Tensor, Tensor]
"""w, α, dL/dŵ."""


@pytest.fixture(name="kernels")
def triton_kernels() -> ModuleType:
    return interpreted_kernels()


def random_case(quantizer: Quantizer, shape: tuple[int, ...], group_size: int | None, dtype: torch.dtype) -> Case:
    """Gaussian weights with scales small enough that some of every row are clipped."""
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator).to(dtype)
    alpha = initial_scale(quantizer, w, group_size)
    alpha *= torch.linspace(0.5, 1.1, alpha.numel()).reshape(alpha.shape)
    return w, alpha, torch.randn(shape, generator=generator).to(dtype)


def awkward_case(quantizer: Quantizer, dtype: torch.dtype) -> Case:
    """Ties and clip edges with their neighbours, both zeros, denormals, a row of zeros, scales below the floor."""
    edges = torch.tensor([code / 2 for code in range(-300, 301)])
    edges = torch.cat([edges, edges / quantizer.steps, (edges + quantizer.shift) / quantizer.steps])
    edges = torch.cat(
        [edges, torch.tensor([-1.0, -0.99, 0.99, 1.0, 0.0, -0.0, 1e-40, -1e-40, 1e-45, -1e-45, 1e30, -1e30])]
    )
    edges = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)])
    scales = torch.tensor([1.0, 0.5, 3e-5, 0.7, SCALE_FLOOR, 9e-6, 0.0, -1.0, 1.0])
    w = edges * scales.clamp_min(SCALE_FLOOR).unsqueeze(-1)
    w[-1] = 0
    grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    return w.to(dtype), scales.to(dtype), grad.to(dtype)


def check(kernels: ModuleType, quantizer: Quantizer, case: Case, grad_factor: float = 0.25) -> None:
    w, alpha, grad = case
    value = kernels.quantize(quantizer, w, alpha)
    grad_w, grad_alpha = kernels.gradients(quantizer, grad, w, alpha, grad_factor)
    expected_w, _ = reference.gradients(quantizer, grad, w, alpha, grad_factor)
    assert torch.equal(value, reference.quantize(quantizer, w, alpha))
    assert (value.dtype, grad_w.dtype, grad_alpha.dtype) == (w.dtype, w.dtype, alpha.dtype)
    assert torch.equal(grad_w, expected_w)
    exact, size = exact_alpha_gradient(quantizer, case, grad_factor)
    assert grad_alpha.shape == alpha.shape
    # fp32 rounds each of the products a few times, and their sum; then α's dtype rounds
    slack = 2e-6 * size + torch.finfo(alpha.dtype).eps * exact.abs()
    assert ((grad_alpha.double() - exact).abs() <= slack).all()


def exact_alpha_gradient(quantizer: Quantizer, case: Case, grad_factor: float) -> tuple[Tensor, Tensor]:
    """dL/dα summed in float64, and the sum of the sizes of all its terms.

    Which level a weight takes, and whether it is clipped, is what fp32's w/α says: on a tie float64's says otherwise.
    """
    w, alpha, grad = case
    x, a = reference.rows_of(w, alpha)
    v, code = x / a, reference.encode_rows(quantizer, x, a).double()
    inside = (v >= quantizer.low) & (v <= quantizer.high)
    level, exact_v = (code + quantizer.shift) / quantizer.steps, x.double() / a.double()
    outside = code if quantizer.name == "ternary" else level
    slope = code if quantizer.name == "binary" else torch.where(inside, level - exact_v, outside)
    terms = slope * grad.double().reshape(x.shape)
    sizes = (slope.abs() + level.abs()) * grad.double().reshape(x.shape).abs()
    return tuple((part.sum(-1) * grad_factor).reshape(alpha.shape) for part in (terms, sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_random_weights(kernels: ModuleType, bits: float, dtype: torch.dtype) -> None:
    quantizer = get_quantizer(bits)
    for shape, group_size in (((5, 2049), None), ((3, 96), 32), ((7, 1), None), ((2, 3, 33), None), ((2, 3, 40), 8)):
        check(kernels, quantizer, random_case(quantizer, shape, group_size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_ties_edges_zeros_denormals_and_scales_below_the_floor(
    kernels: ModuleType, bits: float, dtype: torch.dtype
) -> None:
    check(kernels, get_quantizer(bits), awkward_case(get_quantizer(bits), dtype))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_bf16_weights_with_fp32_scales(kernels: ModuleType, bits: float) -> None:
    w, alpha, grad = random_case(get_quantizer(bits), (5, 300), None, torch.bfloat16)
    assert alpha.dtype == torch.float32, "the example"
    check(kernels, get_quantizer(bits), (w, alpha, grad))
    check(kernels, get_quantizer(bits), (w, alpha.bfloat16(), grad))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_weights_gradients_and_scales_that_are_not_contiguous(kernels: ModuleType, bits: float) -> None:
    quantizer = get_quantizer(bits)
    w, alpha, grad = random_case(quantizer, (6, 64), None, torch.float32)
    strided = w.T.contiguous().T, alpha.repeat_interleave(2)[::2], grad.repeat_interleave(2, dim=1)[:, ::2]
    assert not any(tensor.is_contiguous() for tensor in strided)
    check(kernels, quantizer, strided)
    check(kernels, quantizer, (w[:, 8:40], alpha, grad[:1, 8:40].expand(6, -1)))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_no_rows_and_no_channels(kernels: ModuleType, bits: float) -> None:
    quantizer = get_quantizer(bits)
    for shape, scales in (((0, 8), (0,)), ((0, 8), (0, 2)), ((3, 0), (3,))):
        w, alpha = torch.empty(shape), torch.ones(scales)
        assert kernels.quantize(quantizer, w, alpha).shape == w.shape
        grad_w, grad_alpha = kernels.gradients(quantizer, w, w, alpha, 1.0)
        assert grad_w.shape == w.shape
        assert grad_alpha.tolist() == torch.zeros(scales).tolist()


@pytest.mark.parametrize("bits", [1.58, 2, 4])
def test_nan_stays_nan(kernels: ModuleType, bits: float) -> None:
    w, alpha, _ = random_case(get_quantizer(bits), (3, 40), None, torch.float32)
    w[1, 7] = torch.nan
    found = kernels.quantize(get_quantizer(bits), w, alpha)
    assert found.isnan().nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("bits", BITS)
def test_the_plain_arithmetic_in_float64_is_the_tables(bits: float) -> None:
    """What the others are held against, on their awkward inputs, against one Python float at a time."""
    w, alpha, grad = (tensor.double() for tensor in awkward_case(get_quantizer(bits), torch.float32))
    w, grad = w[:, ::7], grad[:, ::7]
    alpha = alpha.where(alpha > 2e-5, 0.0)  # of a scale at the floor, fp32's and float64's differ
    w[alpha == 0] = w[alpha == 0] * 0.9
    table = [[value_and_slopes(x, a, bits) for x in row] for row, a in zip(w.tolist(), alpha.tolist(), strict=True)]
    value, slope_w, slope_alpha = torch.tensor(table, dtype=torch.float64).unbind(-1)
    torch.testing.assert_close(reference.quantize(get_quantizer(bits), w, alpha), value, rtol=1e-15, atol=0)
    grad_w, grad_alpha = reference.gradients(get_quantizer(bits), grad, w, alpha, 1.0)
    assert torch.equal(grad_w, grad * slope_w)
    torch.testing.assert_close(grad_alpha, (grad * slope_alpha).sum(-1), rtol=1e-12, atol=1e-12)


def test_rows_of_several_tiles_and_tiles_of_several_rows(kernels: ModuleType) -> None:
    quantizer = get_quantizer(2)
    w, alpha, grad = random_case(quantizer, (5, 100), None, torch.float32)
    for weights in (16, 128, 1024):
        tile = kernels.Tile(weights, warps=1)
        assert torch.equal(kernels.quantize(quantizer, w, alpha, tile), reference.quantize(quantizer, w, alpha))
        grad_w, grad_alpha = kernels.gradients(quantizer, grad, w, alpha, 1.0, tile)
        expected_w, expected_alpha = reference.gradients(quantizer, grad, w, alpha, 1.0)
        assert torch.equal(grad_w, expected_w)
        torch.testing.assert_close(grad_alpha, expected_alpha, rtol=1e-5, atol=1e-5)


def spied(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[str]:
    """Notes every call of a function."""
    calls: list[str] = []
    original: Callable[..., object] = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: (calls.append(name), original(*given))[1])
    return calls


def test_the_operators_run_in_a_compiled_graph(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a graph holds the kernels as operators. Here CPU tensors are sent there too, interpreted."""
    quantizer = get_quantizer(4)
    w, alpha, grad = random_case(quantizer, (5, 48), 16, torch.float32)

    def gradients_of(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (w, alpha)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    expected = gradients_of(lambda w, alpha: fake_quantize(quantizer, w, alpha, 0.5))
    monkeypatch.setattr("qatscale.quant.fake_quantize._has_kernels", lambda w, scale: True)  # noqa: ARG005
    operators = spied(monkeypatch, kernels, "quantize")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda w, alpha: fake_quantize(quantizer, w, alpha, 0.5), fullgraph=True, backend="aot_eager"
    )
    for found, wanted in zip(gradients_of(compiled), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert operators == ["quantize"]
    for operator, arguments in (
        (torch.ops.qatscale.quantize.default, (w, alpha, "4")),
        (torch.ops.qatscale.gradients.default, (grad, w, alpha, "4", 0.5)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
