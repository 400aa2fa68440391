"""SentencePiece BPE through a cache of words: the same ids as the library's own encoder, several times as fast.

The library runs its merges over the whole document. A merge only ever makes a piece of the vocabulary, so where no
piece holds two neighbouring characters a, b in that order, no merge crosses a boundary between an a and a b, and the
text on both sides can be encoded on its own. In a vocabulary trained as usual, "▁" (the space) stands at the start of
a piece or among other spaces only, and a line break in no piece: every word with the spaces before it, and every line
break, is such a segment. Words repeat, so most of them are a dictionary look-up.

`segment_encoder` checks the vocabulary for that and returns None where it does not hold.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

SPACE = "▁"
_SEGMENT = re.compile(" *[^ ]+| +")
_CACHED_CHARACTERS = 48
"""Longer segments (URLs, base64) hardly ever come back."""
_CACHE_ENTRIES = 400_000
"""Per cache, about 60 MB; a full cache starts anew."""


class _Cache(dict[str, bytes]):
    """Segment (less `prefix`) -> its ids, as the bytes of an array."""

    def __init__(self, prefix: str, processor: Any, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._prefix, self._processor, self._dtype = prefix, processor, dtype

    def __missing__(self, segment: str) -> bytes:
        ids = np.array(self._processor.encode(self._prefix + segment), dtype=self._dtype).tobytes()
        if len(segment) <= _CACHED_CHARACTERS:
            if len(self) >= _CACHE_ENTRIES:
                self.clear()
            self[segment] = ids
        return ids


class SegmentEncoder:
    """`encode(text) -> ids` for a SentencePiece BPE model whose merges stay within words."""

    def __init__(self, processor: Any, dummy_prefix: bool, dtype: np.dtype[Any]) -> None:
        """`processor`: the model with its dummy prefix turned off, which `dummy_prefix` says was on."""
        self._dtype = dtype
        self._start = " " if dummy_prefix else ""
        self._segments = _Cache("", processor, dtype)
        self._words = _Cache(" ", processor, dtype)  # keyed by the word alone: str.split gives it so
        self._newline = self._segments["\n"]

    def encode(self, text: str) -> np.ndarray:
        """Ids [tokens] of `text`; no EOS."""
        if not text:
            return np.zeros(0, self._dtype)
        if SPACE in text:  # means a space to SentencePiece too
            text = text.replace(SPACE, " ")
        parts: list[bytes] = []
        segment, word = self._segments.__getitem__, self._words.__getitem__
        for line in (self._start + text).split("\n"):
            stripped = line.lstrip(" ")
            if "  " in stripped:
                parts.extend(map(segment, _SEGMENT.findall(line)))
            elif line:
                words = stripped.split(" ")
                parts.append(segment(line[: len(line) - len(stripped)] + words[0]))
                parts.extend(map(word, words[1:]))
            parts.append(self._newline)
        parts.pop()  # one line break fewer than lines
        return np.frombuffer(b"".join(parts), dtype=self._dtype)


def segment_encoder(model: bytes, dtype: np.dtype[Any]) -> SegmentEncoder | None:
    """An encoder for the serialized SentencePiece `model`, or None where segments are not independent."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    bpe = trainer.model_type == trainer.BPE and not trainer.treat_whitespace_as_suffix
    # Without byte fallback neighbouring unknown characters become one <unk>, across any boundary.
    untouched = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    if not (bpe and trainer.byte_fallback and untouched and normalizer.escape_whitespaces):
        return None
    for piece in proto.pieces:
        if piece.type == piece.USER_DEFINED or "\n" in piece.piece or SPACE in piece.piece.lstrip(SPACE):
            return None
    dummy_prefix = normalizer.add_dummy_prefix
    normalizer.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return SegmentEncoder(processor, dummy_prefix, dtype)
