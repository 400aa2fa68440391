"""Shrunken Llamas: every head layout, tied and untied, sizes that are no powers of two."""

from __future__ import annotations

from qatscale.config.schema import ModelConfig

CONFIGS = {
    "mha-tied": ModelConfig(vocab_size=96, hidden_size=32, layers=2, heads=4, intermediate_size=88),
    "mha-untied": ModelConfig(
        vocab_size=101, hidden_size=24, layers=1, heads=2, intermediate_size=40, tied_embedding=False, norm_eps=1e-6
    ),
    "gqa-tied": ModelConfig(
        vocab_size=96, hidden_size=64, layers=2, heads=8, kv_heads=2, intermediate_size=72, rope_theta=500_000.0
    ),
    "mqa-untied": ModelConfig(
        vocab_size=61, hidden_size=30, layers=3, heads=3, kv_heads=1, intermediate_size=35, tied_embedding=False
    ),
    "llama3": ModelConfig(
        vocab_size=96, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=12, intermediate_size=72,
        rope_theta=500.0, rope_scaling=(8, 1, 4, 64),
    ),
    "qwen2": ModelConfig(
        vocab_size=101, hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=88, attention_bias=True
    ),
    "qwen3": ModelConfig(
        vocab_size=96, hidden_size=30, layers=2, heads=3, kv_heads=1, head_dim=16, qk_norm=True, intermediate_size=40,
        tied_embedding=False,
    ),
}  # fmt: skip
