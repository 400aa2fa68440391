"""Models that mlx-lm runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qatscale.export.formats.base import Exported
from qatscale.inference.sampling import Detokenizer, Sampling


class MlxModel:
    def __init__(self, export: Exported) -> None:
        from mlx_lm import load

        self._model, self._tokenizer, config = load(str(export.path), return_config=True)
        self.about = f"{export.path}: {export.format.name}, with mlx-lm"
        self.length: int | None = config.get("max_position_embeddings")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def stream(self, prompt: list[int], sampling: Sampling, write: Callable[[str], Any]) -> None:
        import mlx.core as mx
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(sampling.seed)
        sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        pieces = Detokenizer(lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True), prompt)
        for step in stream_generate(self._model, self._tokenizer, prompt, max_tokens=sampling.tokens, sampler=sampler):
            if step.token in self._tokenizer.eos_token_ids:
                break
            write(pieces.add(step.token))
        write(pieces.rest())
