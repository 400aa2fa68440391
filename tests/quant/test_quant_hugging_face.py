"""The plugin on transformers' Llama, whose layers are named q_proj, embed_tokens, lm_head."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qatscale.config.schema import QatConfig
from qatscale.quant.plugin import PlainMasters, QatPlugin, scale_groups, view
from qatscale.quant.selection import fake_quant_modules


def a_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_prepare_switch_and_train(tied: bool, recompute: bool) -> None:
    model = a_llama(tied)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    before = model(input_ids=tokens, labels=tokens).loss.item()

    plugin = QatPlugin(QatConfig(scheme="fused", bits=2), 1)
    plugin.prepare(model)
    names = [name for name, _ in fake_quant_modules(model)]
    assert len(names) == 14 + 2 * tied
    assert "model.layers.1.self_attn.k_proj" in names
    assert "model.layers.0.mlp.down_proj" in names
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    assert model(input_ids=tokens, labels=tokens).loss.item() == before

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    masters = PlainMasters(optimizer)
    report = plugin.maybe_switch(1, masters)
    assert report is not None
    assert len(report.modules) == 14 + tied
    assert list(report.left_out) == ([] if tied else ["model.embed_tokens", "lm_head"])

    loss = model(input_ids=tokens, labels=tokens).loss
    assert loss.item() != before
    loss.backward()
    for scales in scale_groups(model).values():
        for scale in scales:
            assert scale.grad is not None
            assert scale.grad.abs().sum() > 0
    optimizer.step()
    plugin.check_moving(masters)
    with view(model, "fp"), torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens, labels=tokens).loss)
    model.tie_weights()
    assert not tied or model.lm_head.weight is model.model.embed_tokens.weight
