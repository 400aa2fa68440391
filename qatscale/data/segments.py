"""SentencePiece BPE through caches: the same ids as the library's own encoder, many times as fast.

The library runs its merges over the whole document. A merge only ever makes a piece of the vocabulary, so where no
piece holds two neighbouring characters a, b in that order, no merge crosses a boundary between an a and a b, and the
text on both sides can be encoded on its own. Two such cuts are used:

- Words. In a vocabulary trained as usual, "▁" (the space) stands at the start of a piece or among other spaces only,
  and a line break in no piece: every word with the spaces before it, and every line break, stands alone. Words repeat,
  so most of them are a dictionary look-up.
- Runs, for words not seen before: characters that occur together in pieces form groups, letters of a script one,
  punctuation another, and a word is cut where the group changes. "(foo.bar)," is new, "(", "foo", ".", "bar" are not.

`segment_encoder` checks the vocabulary for the first and finds the groups of the second in it.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

SPACE = "▁"
_MARK = "\x00"
"""Stands for every space of a run but its first while a text is split at spaces."""
_CACHED_CHARACTERS = 48
"""Longer words (URLs, base64) hardly ever come back."""
_CACHE_ENTRIES = 400_000
"""Per cache, at most about 80 MB; a full cache starts anew."""


class _Cache(dict[str, bytes]):
    """Text -> its ids, as the bytes of an array; what is missing is encoded and, unless too long, kept."""

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
        """`processor`: the model with its dummy prefix turned off, which `dummy_prefix` says was on.

        `cuts`: finds the independent runs of a word, each with the spaces before it; a line break is one.
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
        text = self._start + text
        if _MARK in text:  # hardly ever in a text, and then the library's own way
            return np.array(self._processor.encode(text), self._dtype)
        if SPACE in text:  # means a space to SentencePiece too
            text = text.replace(SPACE, " ")
        if "  " in text:  # of a run all spaces but the first become marks, so that splitting leaves them at the word
            text = text.replace("  ", " " + _MARK).replace(_MARK + " ", _MARK + _MARK)
        first, *words = text.replace("\n", " \n").split(" ")
        parts = [self._encode_start(first)] if first else []
        parts.extend(map(self._words.__getitem__, words))
        return np.frombuffer(b"".join(parts), dtype=self._dtype)

    def _encode_word(self, text: str) -> bytes:
        """What stands between spaces -> ids, those of the space before it included unless it starts a line."""
        return self._encode_start(text if text.startswith("\n") else f" {text}")

    def _encode_start(self, text: str) -> bytes:
        """Ids of a word that has no other space before it than its own."""
        return b"".join(map(self._runs.__getitem__, self._cuts.findall(text.replace(_MARK, " "))))

    def _encode_run(self, text: str) -> bytes:
        """Spaces and the run after them -> ids, by the library."""
        return array(self._dtype.char, self._processor.encode(text)).tobytes()  # faster than NumPy on a few numbers


def segment_encoder(model: bytes, dtype: np.dtype[Any]) -> SegmentEncoder | None:
    """An encoder for the serialized SentencePiece `model`, or None where words are not independent."""
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
    cuts = _cuts(piece.piece.lstrip(SPACE) for piece in proto.pieces if piece.type in (piece.NORMAL, piece.UNUSED))
    dummy_prefix = normalizer.add_dummy_prefix
    normalizer.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return SegmentEncoder(processor, dummy_prefix, cuts, dtype)


def _cuts(pieces: Iterable[str]) -> re.Pattern[str]:
    """Finds runs of characters of one group, a group being what neighbourhood in `pieces` connects.

    A character that has no neighbour in any piece is a run of its own. Spaces go with the run after them.
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
