"""SentencePiece BPE through caches: the same ids as the library's own encoder, several times as fast.

The library runs its merges over the entire document. A merge only ever makes a piece of the vocabulary. If no piece
holds the neighbouring characters a, b in that order, no merge crosses a boundary between an a and a b. The text on both
sides can then be encoded separately. Two such cuts are used:

- Words. In a vocabulary trained as usual, "▁" (the space) stands only at the start of a piece or among other spaces.
  No piece holds a line break. So a word with the spaces before it is independent, and so is a line break. Words
  repeat, so most of them are a dictionary look-up.
- Runs, for new words. Characters that occur together in pieces form groups, for example the letters of a script. A word
  is cut where the group changes: "(foo.bar)," is new, but "(", "foo", ".", "bar" are not.

`segment_encoder` checks that the vocabulary allows the first cut, and derives the groups of the second from it.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

SPACE = "▁"
"""U+2581, SentencePiece's sign for a space."""
_WORDS = re.compile(r"\n| *[^ \n]+| +")
_CACHED_CHARACTERS = 48
"""Longer words (URLs, base64) rarely occur again."""
_CACHE_ENTRIES = 400_000
"""Per cache, at most about 80 MB; a full cache is emptied."""


class _Cache(dict[str, bytes]):
    """Text -> its ids, as the bytes of an array. A missing text is encoded and, unless too long, kept."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, text: str) -> bytes:
        ids = self._encode(text)
        if len(text) <= _CACHED_CHARACTERS:
            if len(self) >= _CACHE_ENTRIES:
                self.clear()
            self[text] = ids
        return ids


class SegmentEncoder:
    """`encode(text) -> ids` for a SentencePiece BPE model whose merges stay within words."""

    def __init__(self, processor: Any, dummy_prefix: bool, cuts: re.Pattern[str], dtype: np.dtype[Any]) -> None:
        """`processor`: the model with its dummy prefix turned off; `dummy_prefix` says whether it was on.

        `cuts`: finds the independent runs of a word, each with the spaces before it.
        """
        self._dtype, self._processor = dtype, processor
        self._start = " " if dummy_prefix else ""
        self._cuts = cuts
        self._runs = _Cache(self._encode_run)
        self._words = _Cache(self._encode_word)

    def encode(self, text: str) -> np.ndarray:
        """Ids [tokens] of `text`; no EOS."""
        if not text:
            return np.zeros(0, self._dtype)
        text = (self._start + text).replace(SPACE, " ")  # SentencePiece reads ▁ as a space too
        return np.frombuffer(b"".join(map(self._words.__getitem__, _WORDS.findall(text))), dtype=self._dtype)

    def _encode_word(self, text: str) -> bytes:
        return b"".join(map(self._runs.__getitem__, self._cuts.findall(text)))

    def _encode_run(self, text: str) -> bytes:
        return array(self._dtype.char, self._processor.encode(text)).tobytes()  # faster than NumPy on a few numbers


def model_proto(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)


def segment_encoder(model: bytes, dtype: np.dtype[Any]) -> SegmentEncoder | None:
    """An encoder for the serialized SentencePiece `model`, or None where words are not independent."""
    import sentencepiece

    proto = model_proto(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    bpe = trainer.model_type == trainer.BPE and not trainer.treat_whitespace_as_suffix
    # without byte fallback neighbouring unknown characters become one <unk>, across any boundary
    untouched = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    if not (bpe and trainer.byte_fallback and untouched and normalizer.escape_whitespaces):
        return None
    for piece in proto.pieces:
        if piece.type == piece.USER_DEFINED or "\n" in piece.piece or SPACE in piece.piece.lstrip(SPACE):
            return None
    cuts = _cuts(piece.piece.lstrip(SPACE) for piece in proto.pieces if piece.type in (piece.NORMAL, piece.UNUSED))
    dummy_prefix = normalizer.add_dummy_prefix
    normalizer.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return SegmentEncoder(processor, dummy_prefix, cuts, dtype)


def _cuts(pieces: Iterable[str]) -> re.Pattern[str]:
    """Finds runs of characters of one group; characters that are neighbours in a piece share a group.

    A character without a neighbour in any piece is a run of its own. Spaces belong to the run after them.
    """
    group: dict[str, set[str]] = {}
    for piece in pieces:
        for left, right in itertools.pairwise(piece):
            one, other = group.setdefault(left, {left}), group.setdefault(right, {right})
            if one is not other:
                small, large = sorted((one, other), key=len)
                large |= small
                group.update(dict.fromkeys(small, large))
    groups = {id(members): members for members in group.values()}.values()
    runs = ["[" + "".join(map(re.escape, sorted(members))) + "]+" for members in groups]
    return re.compile(f" *(?:{'|'.join([*runs, '[^ ]'])})| +")
