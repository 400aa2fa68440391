"""The cross-entropy against float64."""

from __future__ import annotations

import pytest
import torch

from qatscale.model.loss import cross_entropy


def reference(logits, labels):
    """Loss and gradient in float64."""
    wide = logits.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide.flatten(0, -2), labels.flatten())
    (grad,) = torch.autograd.grad(loss, wide)
    return loss.detach(), grad


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(("b", "t", "v"), [(2, 5, 11), (1, 1, 2), (3, 7, 1000)])
def test_loss_and_gradient_equal_float64(scale, b, t, v):
    generator = torch.Generator().manual_seed(v)
    logits = (scale * torch.randn(b, t, v, generator=generator)).requires_grad_()
    labels = torch.randint(v, (b, t), generator=generator)
    expected, expected_grad = reference(logits, labels)
    loss = cross_entropy(logits, labels)
    loss.backward()
    # logit - max is exact to an fp32 ulp of the logits; the rest is relative to the loss
    largest = logits.abs().max().item()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=2**-22 * max(1, largest))
    # a probability is off by as much as the rounding of its logit
    torch.testing.assert_close(logits.grad.double(), expected_grad, rtol=2e-6, atol=1e-7 / (b * t))


def test_an_impossible_label_costs_its_logit_difference():
    """exp(-300) is 0 in fp32; the loss is still 300, as log-softmax gives it, and its gradient is finite."""
    logits = torch.zeros(1, 1, 4)
    logits[..., 2] = 300.0
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([[0]]))
    loss.backward()
    assert loss.item() == 300.0
    assert logits.grad.flatten().tolist() == [-1.0, 0.0, 1.0, 0.0]


def test_equal_logits_cost_log_v():
    loss = cross_entropy(torch.full((2, 3, 32_000), 5.0), torch.zeros(2, 3, dtype=torch.int64))
    assert loss.item() == pytest.approx(10.373491181781864, rel=2e-7)  # ln 32000


def test_bf16_logits_are_summed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(4, 8, 5000, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(5000, (4, 8), generator=generator)
    expected, expected_grad = reference(logits, labels)
    loss = cross_entropy(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), expected_grad, rtol=2**-8, atol=1e-9)  # one rounding to bf16


def test_a_scaled_loss_scales_its_gradient():
    """Gradient accumulation divides the loss before backward."""
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[0, 1, 2], [3, 4, 6]])
    (whole,) = torch.autograd.grad(cross_entropy(logits, labels), logits)
    (quarter,) = torch.autograd.grad(cross_entropy(logits, labels) / 4, logits)
    assert torch.equal(quarter, whole / 4)


def test_one_fp32_tensor_of_the_logits_size_is_kept():
    kept = []
    logits = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64))
    assert [t.dtype for t in kept if t.numel() == logits.numel()] == [torch.float32]


def test_a_second_backward_is_refused_not_wrong():
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(1, 2, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
