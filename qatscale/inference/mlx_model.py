"""Models that mlx-lm runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qatscale.errors import UserError
from qatscale.inference.exported import Exported
from qatscale.inference.sampling import Detokenizer, Sampling


class MlxModel:
    def __init__(self, export: Exported) -> None:
        try:
            from mlx_lm import load
        except ImportError:
            told = "mlx-lm, which runs this format, is not installed."
            raise UserError("model", str(export.folder), told, "pip install 'qatscale[clients]'") from None
        try:
            self._model, self._tokenizer, config = load(str(export.folder), return_config=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError("model", str(export.folder), f"mlx-lm cannot load it: {error}") from None
        self.about = f"{export.folder}: mlx, with mlx-lm"
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
        for said in stream_generate(self._model, self._tokenizer, prompt, max_tokens=sampling.tokens, sampler=sampler):
            if said.token in self._tokenizer.eos_token_ids:
                break
            write(pieces.add(said.token))
        write(pieces.rest())
