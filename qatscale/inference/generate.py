"""What a model says: text that goes on from a prompt, piece by piece as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qatscale.errors import UserError
from qatscale.inference.exported import find_export


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest, always the same."""

    tokens: int = 128
    """At most; fewer where the model ends its text."""
    temperature: float = 0.8
    top_k: int = 0
    """Only among so many of the likeliest; 0: all."""
    top_p: float = 0.95
    """Only among the likeliest that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError("--tokens", self.tokens, "at least 1.")
        if not 0 <= self.temperature <= 100:
            raise UserError("--temperature", self.temperature, "0 (the likeliest token) up to 100.")
        if self.top_k < 0:
            raise UserError("--top-k", self.top_k, "0 (all) or a number of tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError("--top-p", self.top_p, "above 0, up to 1 (all).")


class Detokenizer:
    """Text from tokens, one by one, as the tokens behind a prompt continue it.

    A tokenizer's first token loses its leading space when decoded, and a character may be spread over several tokens:
    so the last pieces are decoded again with each new one, and what ends within a character waits for the next.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]) -> None:
        self._decode = decode
        self._ids = list(prompt)
        self._from, self._told = max(0, len(prompt) - 8), len(prompt)
        """Decoded anew from here; told up to here."""

    def add(self, token: int) -> str:
        """What can be told with this token; empty where it ends within a character."""
        self._ids.append(token)
        text = self._new()
        if text.endswith("\ufffd"):
            return ""
        self._from, self._told = self._told, len(self._ids)
        return text

    def rest(self) -> str:
        """What waited for a token that did not come."""
        text, self._told = self._new(), len(self._ids)
        return text

    def _new(self) -> str:
        before = self._decode(self._ids[self._from : self._told])
        return self._decode(self._ids[self._from :])[len(before) :]


class Speaker(Protocol):
    """A loaded model."""

    about: str
    """What it is, in a line."""
    length: int | None
    """Tokens of the sequences that it was trained on."""

    def encode(self, text: str) -> list[int]: ...

    def stream(self, prompt: list[int], sampling: Sampling, write: Callable[[str], Any]) -> None:
        """Give the text that follows the token ids of a prompt to `write`, as it comes."""


def open_speaker(what: str, view: str | None = None) -> Speaker:
    """The model of an exported folder, or of a run, RUN@STEP or a checkpoint folder, on the GPU where there is one.

    view: of a checkpoint's weights, `fp` or `quantized`; None: quantized once it has switched.
    """
    export = find_export(Path(what))
    if export is not None and export.format == "mlx" and view is None:
        from qatscale.inference.mlx_model import MlxModel

        return MlxModel(export)
    from qatscale.inference.transformers_model import open_transformers

    return open_transformers(what, view)


def prompt_ids(speaker: Speaker, prompt: str, sampling: Sampling) -> list[int]:
    """The tokens of a prompt. UserError for one without any, and for a text longer than those of training."""
    ids = speaker.encode(prompt)
    if not ids:
        raise UserError("--prompt", prompt, "a text to go on from; it has no tokens.")
    if speaker.length is not None and len(ids) + sampling.tokens > speaker.length:
        room = speaker.length - len(ids)
        allowed = f"the model was trained on sequences of {speaker.length:,} tokens, and the prompt has {len(ids):,}."
        do = f"--tokens {room} is the most." if room > 0 else "Give a shorter prompt."
        raise UserError("--tokens", sampling.tokens, allowed, do)
    return ids
