"""Drawing tokens from a model, and turning them into text piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from qatscale.errors import UserError

_INCOMPLETE = "\ufffd"
"""Decoders write it in place of a part of a character."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 always takes the likeliest."""

    tokens: int = 128
    """The most; fewer if the model ends its text."""
    temperature: float = 0.8
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens whose probabilities add up to this."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError("--tokens", self.tokens, "must be at least 1.")
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 100:
            raise UserError("--temperature", self.temperature, "must be 0 (the likeliest token), or 0.001 to 100.")
        if self.top_k < 0:
            raise UserError("--top-k", self.top_k, "must be 0 (all) or a number of tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError("--top-p", self.top_p, "must be above 0, up to 1 (all).")


class Detokenizer:
    """The text by which each new token continues a prompt.

    A token decoded by itself loses its leading space, and a character may be spread over several tokens. So all tokens
    are decoded with each new one, and an incomplete character waits for the next token.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]) -> None:
        self._decode, self._ids = decode, list(prompt)
        self._shown = len(decode(self._ids).rstrip(_INCOMPLETE))

    def add(self, token: int) -> str:
        """The text that this token completes; empty where it ends within a character."""
        self._ids.append(token)
        return "" if self._decode(self._ids).endswith(_INCOMPLETE) else self.rest()

    def rest(self) -> str:
        text = self._decode(self._ids)
        start, self._shown = self._shown, len(text)
        return text[start:]


class TextGenerator(Protocol):
    about: str
    """What it is, in one line."""
    length: int | None
    """Tokens of the sequences it was trained on; None if unknown."""

    def encode(self, text: str) -> list[int]: ...

    def stream(self, prompt: list[int], sampling: Sampling, write: Callable[[str], Any]) -> None:
        """Pass the text that follows `prompt` (token ids) to `write`, piece by piece."""


def prompt_ids(generator: TextGenerator, prompt: str, sampling: Sampling) -> list[int]:
    """The tokens of a prompt. UserError if it has none, or if the text would be longer than training sequences."""
    ids = generator.encode(prompt)
    if not ids:
        raise UserError("--prompt", prompt, "cannot be continued: it has no tokens.")
    if generator.length is not None and len(ids) + sampling.tokens > generator.length:
        left = generator.length - len(ids)
        problem = f"the model was trained on sequences of {generator.length:,} tokens, and the prompt has {len(ids):,}."
        fix = f"--tokens {left} is the most." if left > 0 else "Give a shorter prompt."
        raise UserError("--tokens", sampling.tokens, problem, fix)
    return ids
