"""How many tokens go through the head at a time. Pure arithmetic, no torch."""

from __future__ import annotations

_ROWS = {"cpu": 256, "cuda": 8192}
"""Tokens of a chunk at most. On CPUs a small chunk's logits stay in the cache (analysis/benchmarks/step_speed.md). On
GPUs every further chunk reads and writes the weight's gradient once more, a cost that many rows make small."""
_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 29}
"""Logits of a chunk at most, but for _LEAST rows."""
_LEAST = 64


def chunk_rows(tokens: int, vocabulary: int, device: str) -> int:
    """Tokens of a chunk of the loss (`qatscale.model.loss`): as many for each, but for the last.

    vocabulary: rows of the head on this process. device: its type; whatever is no CPU counts as a GPU.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    most = max(_LEAST, min(_ROWS[kind], _LOGITS[kind] // vocabulary))
    return -(-tokens // -(-tokens // most))
