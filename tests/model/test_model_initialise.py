"""Initial weights: their law, and that a draw depends on (seed, name, shape) and nothing else."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from scipy import stats

from qatscale.config.schema import ModelConfig
from qatscale.model.llama import Llama, initial_value, initialise, is_norm

CONFIG = ModelConfig(
    vocab_size=500, hidden_size=64, layers=8, heads=4, kv_heads=2, intermediate_size=160, tied_embedding=False,
    init_std=0.03,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = Llama(CONFIG)
    initialise(model, seed=11)
    return model


def test_matrices_are_normal_with_the_documented_deviation(model):
    """Mean, deviation and shape of every matrix within 5 standard errors (about 60 of them: 1 in 30,000 by chance)."""
    for name, parameter in model.named_parameters():
        if is_norm(name):
            continue
        residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
        std = 0.03 / math.sqrt(2 * 8) if residual else 0.03
        values, n = parameter.detach().double().flatten(), parameter.numel()
        assert abs(values.mean().item()) < 5 * std / math.sqrt(n), name
        assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
        assert stats.kstest(values.numpy() / std, "norm").pvalue > 1e-6, name


def test_norms_are_one(model):
    norms = [p for n, p in model.named_parameters() if is_norm(n)]
    assert len(norms) == 2 * 8 + 1
    assert all(torch.equal(p, torch.ones(64)) for p in norms)


def test_draws_are_independent(model):
    """No two matrices of one shape agree, nor correlate by more than 5 standard errors."""
    seen = {}
    for name, parameter in model.named_parameters():
        if is_norm(name):
            continue
        for other, before in seen.get(parameter.shape, ()):
            r = torch.corrcoef(torch.stack((parameter.detach().flatten(), before.flatten())))[0, 1].item()
            assert abs(r) < 6 / math.sqrt(parameter.numel()), (name, other)
        seen.setdefault(parameter.shape, []).append((name, parameter.detach()))


def test_a_draw_depends_on_seed_and_name_alone(model):
    name = "blocks.1.mlp.up.weight"
    value = initial_value(name, CONFIG, 11)
    assert torch.equal(value, model.get_parameter(name))
    assert torch.equal(value, initial_value(name, CONFIG.model_copy(update={"layers": 2, "vocab_size": 9}), 11))
    assert not torch.equal(value, initial_value(name, CONFIG, 12))
    torch.manual_seed(5)  # the global generator has no say, and keeps its state
    expected_next = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(value, initial_value(name, CONFIG, 11))
    assert torch.equal(torch.rand(3), expected_next)


def test_a_draw_is_the_documented_one():
    digest = hashlib.sha256(b"11:embed.weight").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    expected = torch.normal(torch.zeros(500, 64), 1.0, generator=generator) * 0.03
    torch.testing.assert_close(initial_value("embed.weight", CONFIG, 11), expected, rtol=1e-6, atol=0)


def test_another_process_draws_the_same():
    code = (
        "import hashlib; from qatscale.config.schema import ModelConfig; from qatscale.model.llama import *;"
        "c = ModelConfig(vocab_size=50, hidden_size=16, layers=2, heads=2, intermediate_size=24);"
        "m = Llama(c); initialise(m, 4);"
        "print(hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in m.parameters())).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    ]  # fmt: skip
    assert runs[0] == runs[1] != ""


def test_a_bf16_model_gets_the_rounded_values():
    low = Llama(CONFIG).bfloat16()
    initialise(low, 11)
    for name, parameter in low.named_parameters():
        assert torch.equal(parameter, initial_value(name, CONFIG, 11).bfloat16())
