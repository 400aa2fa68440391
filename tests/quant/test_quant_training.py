"""What QAT is for, in a plain PyTorch loop: at 2 bits a trained quantized model beats quantizing a trained model."""

from __future__ import annotations

import torch

from qatscale.config.schema import QatConfig
from qatscale.quant.plugin import PlainMasters, QatPlugin, scale_groups, view
from tests.quant.quant_models import TinyModel, a_batch, entropy

STEPS, SWITCH, RATE = 500, 250, 4e-3


def train(qat: QatConfig, switch_step: int | None) -> TinyModel:
    """FP until `switch_step`, QAT after it; the rate falls linearly over the last half."""
    model = TinyModel()
    plugin = QatPlugin(qat, switch_step)
    plugin.prepare(model)
    scales = scale_groups(model)
    of_scales = {id(p) for group in scales.values() for p in group}
    groups = [{"params": [p for p in model.parameters() if id(p) not in of_scales], "ratio": 1.0}]
    groups += [{"params": p, "weight_decay": 0.0, "ratio": plugin.scale_lr_ratio(bits)} for bits, p in scales.items()]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    masters = PlainMasters(optimizer)
    for step in range(STEPS):
        plugin.maybe_switch(step, masters)
        for group in optimizer.param_groups:
            group["lr"] = group["ratio"] * RATE * min(1.0, 2 * (1 - step / STEPS))
        optimizer.zero_grad()
        model(*a_batch(seed=step, sequences=8)).backward()
        optimizer.step()
    if switch_step is not None:
        plugin.check_moving(masters)
    return model


@torch.no_grad()
def held_out(model: TinyModel) -> float:
    return sum(model(*a_batch(seed=10**6 + index, sequences=32)).item() for index in range(4)) / 4


def test_qat_beats_post_training_quantization_at_2_bits() -> None:
    full_precision, bits = train(QatConfig(), None), 2
    fp = held_out(full_precision)
    with view(full_precision, "ptq", bits):
        ptq = held_out(full_precision)
    fused = held_out(train(QatConfig(scheme="fused", bits=bits), SWITCH))
    scratch = held_out(train(QatConfig(scheme="scratch", bits=bits), 0))
    print(f"{bits} bits: entropy {entropy():.3f}, fp {fp:.3f}, ptq {ptq:.3f}, fused {fused:.3f}, scratch {scratch:.3f}")
    assert entropy() < fp < fused
    assert fused - fp < 0.6 * (ptq - fp)
    assert scratch < ptq
