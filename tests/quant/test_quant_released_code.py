"""Against ParetoQ's released code, as torchao 0.18.0 carries it (`pip install -e .[peers]`).

Known differences, left out here: sign(0) is +1 for us and 0 there. At 1 bit the released code stops the gradient of a
weight beyond its scale, and we do not.
"""

from __future__ import annotations

import pytest
import torch

from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.scales import initial_scale

released = pytest.importorskip("torchao.prototype.paretoq.models.utils_quant", reason="needs torchao==0.18.0")

THEIR_BITS = {1: 1, 1.58: 0, 2: 2, 3: 3, 4: 4}
"""The released code calls ternary 0 bits."""


@pytest.mark.parametrize("bits", THEIR_BITS)
@pytest.mark.parametrize("shrink", [0.3, 1.0, 1.4])
def test_forward_and_gradients_equal_the_released_ones(bits: float, shrink: float) -> None:
    generator = torch.Generator().manual_seed(int(10 * bits))
    w = torch.randn(33, 96, generator=generator)
    upstream = torch.randn(33, 96, generator=generator)
    alpha = initial_scale(get_quantizer(bits), w) * shrink
    alpha[:2] = torch.tensor([0.0, 5e-6])  # below the floor

    ours_w, ours_alpha = w.clone().requires_grad_(), alpha.clone().requires_grad_()
    ours = fake_quantize(get_quantizer(bits), ours_w, ours_alpha, get_quantizer(bits).grad_factor(w.numel()))
    ours.backward(upstream)

    function = released.StretchedElasticQuant if bits in (1.58, 2) else released.LsqBinaryTernaryExtension
    theirs_w, theirs_alpha = w.clone().requires_grad_(), alpha.clone().unsqueeze(-1).requires_grad_()
    theirs = function.apply(theirs_w, theirs_alpha, THEIR_BITS[bits], False)
    theirs.backward(upstream)

    assert torch.equal(ours, theirs)
    trains = (w.abs() <= alpha.clamp_min(1e-5).unsqueeze(-1)) | (bits > 1)
    assert torch.equal(ours_w.grad * trains, theirs_w.grad)
    # The same products summed in another order, or rounded once more on the way: relative to their absolute sum.
    slack = 4e-6 * max(1, get_quantizer(bits).qn) * upstream.abs().sum(-1) / w.numel() ** 0.5
    assert ((ours_alpha.grad - theirs_alpha.grad.squeeze(-1)).abs() <= slack).all()
