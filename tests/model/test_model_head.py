"""The cross-entropy against float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qatscale.model.chunks import chunk_rows
from qatscale.model.head import Head, chunk_loss, fusible_chunk_loss, linear_cross_entropy
from qatscale.model.tensor_parallel import UNSPLIT


def cross_entropy(logits, labels):
    """The loss of logits, as products with an identity matrix, which are exact."""
    return linear_cross_entropy(logits, torch.eye(logits.shape[-1], dtype=logits.dtype), labels)


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
    loss = linear_cross_entropy(torch.full((2, 3, 1), 5.0), torch.ones(32_000, 1), torch.zeros(2, 3, dtype=torch.int64))
    assert loss.item() == pytest.approx(10.373491181781864, rel=2e-7)  # ln 32000


def test_bf16_logits_are_summed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(4, 8, 2000, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(2000, (4, 8), generator=generator)
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


def product(n=300, v=131, d=24, dtype=torch.float32, seed=0):
    """x [n, D], weight [V, D] and labels [n]: more than one chunk on CPU, the last one shorter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(v, (n,), generator=generator)


def product_reference(x, weight, labels):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    loss = torch.nn.functional.cross_entropy(x @ weight.T, labels)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize("n", [1, 255, 256, 300, 777])
@pytest.mark.parametrize("form", [chunk_loss, fusible_chunk_loss])
def test_loss_of_a_product_in_chunks_equals_float64(n, form):
    x, weight, labels = product(n)
    expected, grad_x, grad_weight = product_reference(x, weight, labels)
    loss = linear_cross_entropy(x, weight, labels, chunk=form)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(x.grad.double(), 3 * grad_x, rtol=1e-5, atol=3e-5 / n)  # logits of 20 are off by 2e-6
    torch.testing.assert_close(weight.grad.double(), 3 * grad_weight, rtol=1e-5, atol=1e-6)


def test_the_weights_gradient_of_bf16_chunks_is_added_in_fp32():
    """In bf16 sums the small gradients of late chunks would be lost beside the first ones': errors grow with chunks.
    Here each is as good as one rounding of its operands makes it."""
    x, weight, labels = product(256 * 16, dtype=torch.bfloat16)
    expected, _, grad_weight = product_reference(x, weight, labels)
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)  # the logits are rounded to bf16
    assert weight.grad.dtype == torch.bfloat16
    error = (weight.grad.double() - grad_weight).norm() / grad_weight.norm()
    assert error < 2**-8


def test_chunks_are_few_and_alike():
    assert [chunk_rows(n, 1024, "cpu") for n in (1, 256, 257, 1024)] == [1, 256, 129, 256]
    assert chunk_rows(32_768, 32_000, "cuda") == 8192
    assert chunk_rows(8192, 128_256, "cuda") == 4096
    assert chunk_rows(100, 10**9, "cpu") == 50, "never fewer than the least but to make them alike"


class Operations(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, and the number of matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_tensor_has_all_logits():
    x, weight, labels = product(n=2048, v=640)
    with Operations() as operations:
        linear_cross_entropy(x, weight, labels).backward()
    assert operations.largest == 256 * 640
    assert operations.products == 3 * 8, "nothing is computed twice"


def test_without_gradients_none_is_made():
    """Parameters ask for one all the time; validation does not."""
    x, weight, labels = product(64)
    with torch.no_grad(), Operations() as operations:
        loss = linear_cross_entropy(x, weight, labels)
    assert operations.products == 1
    assert loss.item() == pytest.approx(product_reference(x, weight, labels)[0].item(), rel=1e-6)


def a_head(v=131, d=24):
    head = Head(d, v, UNSPLIT)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    return head


def test_the_head_gives_the_loss_of_its_logits_inside_its_own_forward():
    """Between its hooks, where ZeRO-3 has its weight; without labels it gives the logits."""
    x, weight, labels = product(600)
    head, calls = a_head(), []
    head.weight.data.copy_(weight.data)
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.register_forward_hook(lambda *_: calls.append("after"))
    expected, grad_x, grad_weight = product_reference(x, weight, labels)
    loss = head(x.view(2, 300, 24), labels.view(2, 300))
    loss.backward()
    assert calls == ["before", "after"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-5, atol=5e-8)
    torch.testing.assert_close(head.weight.grad.double(), grad_weight, rtol=1e-5, atol=1e-7)
    assert torch.equal(head(x), torch.nn.functional.linear(x, head.weight))


def test_no_tensor_of_a_heads_loss_has_all_logits():
    head, (x, _, labels) = a_head(v=640), product(n=2048, v=640)
    with Operations() as operations:
        head(x, labels).backward()
    assert operations.largest == 256 * 640


def test_a_second_backward_is_refused_not_wrong():
    loss = linear_cross_entropy(*product(10))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
