"""The number of tokens that pass the head at a time. Pure arithmetic, no torch."""

from __future__ import annotations

_ROWS = {"cpu": 256, "cuda": 8192}
"""The most tokens in a chunk. On CPUs a small chunk's logits stay in the cache (analysis/benchmarks/step_speed.md).
On GPUs each chunk reads and writes the weight's gradient once more, so a chunk has many tokens."""
_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 29}
"""The most logits in a chunk of more than _LEAST tokens."""
_LEAST = 64


def chunk_rows(tokens: int, vocabulary: int, device: str) -> int:
    """The tokens in each chunk of the loss (`qatscale.model.head`); the last chunk may have fewer.

    vocabulary: rows of the head on this process. device: its type; every device but a CPU counts as a GPU.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    most = max(_LEAST, min(_ROWS[kind], _LOGITS[kind] // vocabulary))
    return -(-tokens // -(-tokens // most))
