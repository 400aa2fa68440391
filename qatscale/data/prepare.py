"""From sources of text to a folder of token shards: `prepare`.

Memory stays bounded, and the folder is the same bytes for any number of workers and any number of interruptions: the
batches are cut by the reader alone and come back in their order, shards end where a batch ends, and after each shard
`progress.json` says where the sources go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

import qatscale
from qatscale.data import state as states
from qatscale.data.encode import Encoded, encode_all, is_validation
from qatscale.data.indexed import IndexedWriter
from qatscale.data.manifest import FORMAT, Manifest, Shard, TokenizerCard
from qatscale.data.progress import Watch, watch
from qatscale.data.records import Batch, Unit
from qatscale.data.sources import Source, SourceOptions, open_source
from qatscale.data.state import TOKENIZER, State
from qatscale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from qatscale.errors import UserError

VOCABULARY = 32_000
SAMPLE_BYTES = 50_000_000
SHARD_TOKENS = 1 << 28
_UNITS = ("file", "paragraph", "line")


def prepare(
    sources: Sequence[str],
    out: Path | str,
    *,
    field: str = "text",
    split: str = "train",
    text_unit: Unit = "file",
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    sample_bytes: int = SAMPLE_BYTES,
    validation_fraction: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    workers: int | None = None,
    restart: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Tokenize `sources` into `out`: `.bin`/`.idx` shards, `tokenizer/`, and at the end `manifest.json`.

    Killed half-way, the same call goes on from the last finished shard; finished, it returns at once.

    sources: files, folders, globs (JSON lines, Parquet, plain text), names of Hugging Face data sets (`name`,
        `name:config`), or `self`, the embedded corpus (`self:30M` = with at most 30 MB); read one after another.
    out: the folder to make.
    field: the field that holds a document's text (JSON lines, Parquet, data sets).
    split: of a Hugging Face data set.
    text_unit: what is one document in a plain text file: the file, a paragraph (up to a blank line), or a line.
    tokenizer: a SentencePiece .model, a tokenizer's or a prepared folder, or a Hugging Face name; None = train one.
    vocab_size: of the SentencePiece BPE to train; None = 32000.
    sample_bytes: text that it is trained on, taken evenly from the sources and their files, held-out documents not.
    validation_fraction: share of the documents that is held out, chosen by a hash of their text; 0 = none.
    shard_tokens: tokens after which a shard ends.
    max_tokens: stop soon after this many training tokens, the first ones of the sources; None = read everything.
    workers: tokenizing processes; None = one per core.
    restart: discard what an earlier call left in `out`, finished or not.
    console: where to show progress; None = nowhere.

    Raises UserError for whatever is wrong with sources or options, and where `out` holds something else.
    """
    if not sources:
        raise UserError("sources", None, "name at least one.", "A file, a folder, a data set's name, or self.")
    _check(text_unit, tokenizer, vocab_size, sample_bytes, validation_fraction, shard_tokens, max_tokens, workers)
    opened = [open_source(spec, SourceOptions(field, split, text_unit)) for spec in sources]
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    identity: dict[str, Any] = {
        "sources": [source.identity() for source in opened],
        "field": field,
        "text_unit": text_unit,
        "tokenizer": given.fingerprint if given else None,
        "vocab_size": None if given else vocab_size or VOCABULARY,
        "sample_bytes": None if given else sample_bytes,
        "validation_fraction": validation_fraction,
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
    }
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = "is a file." if folder.is_file() else f"cannot be made: {error.strerror}."
        raise UserError("out", str(folder), told, "Choose a new folder.") from None
    states.refuse_strangers(folder)  # before the lock's file is put there
    with states.folder_lock(folder), watch(console) as view:
        if restart:
            states.discard(folder)
        manifest = states.finished(folder, identity)
        if manifest is not None:
            view.say(f"{folder} is prepared already: {_told(manifest)}")
            return manifest
        state = states.resume(folder, identity)
        if state.part:
            view.say(f"{folder}: going on after shard {state.part - 1} ({state.tokens:,} tokens)")
        state.save(folder)
        used = _tokenizer(folder, given, opened, identity, view)
        workers = workers or len(os.sched_getaffinity(0))
        _write_shards(folder, state, opened, used, workers, view)
        manifest = _manifest(state, used, sources)
        manifest.save(folder)
        (folder / states.NAME).unlink()
        view.say(f"{folder}: {_told(manifest)}")
        return manifest


def _check(
    text_unit: str,
    tokenizer: str | None,
    vocab_size: int | None,
    sample_bytes: int,
    validation_fraction: float,
    shard_tokens: int,
    max_tokens: int | None,
    workers: int | None,
) -> None:
    if text_unit not in _UNITS:
        raise UserError("text_unit", text_unit, f"allowed is {', '.join(_UNITS)}.")
    if tokenizer is not None and vocab_size is not None:
        raise UserError("vocab_size", vocab_size, "a given tokenizer has its own.", "Leave out one of the two.")
    if not 0 <= validation_fraction <= 0.5:
        raise UserError("validation_fraction", validation_fraction, "0 to 0.5.", "1 % is usual: 0.01")
    positive = {"vocab_size": vocab_size, "sample_bytes": sample_bytes, "shard_tokens": shard_tokens}
    for name, value in (positive | {"max_tokens": max_tokens, "workers": workers}).items():
        if value is not None and value < 1:
            raise UserError(name, value, "1 or more.")


def _tokenizer(
    folder: Path, given: Tokenizer | None, sources: list[Source], identity: dict[str, Any], view: Watch
) -> Tokenizer:
    """The one in the folder, else the given one, else one trained now; in the folder in any case."""
    saved = folder / TOKENIZER
    if saved.is_dir():
        return load_tokenizer(saved)
    if given is None:
        view.say(f"training a SentencePiece BPE of {identity['vocab_size']:,} pieces")
        texts = _sample(sources, identity["sample_bytes"], identity["validation_fraction"])
        given = train_sentencepiece(texts, identity["vocab_size"])
    given.save(saved)
    return given


def _sample(sources: list[Source], size: int, validation_fraction: float) -> Iterator[str]:
    for source in sources:
        for text in source.sample(-(-size // len(sources))):
            if text and not text.isspace() and not is_validation(text.encode(), validation_fraction):
                yield text


class _Part:
    """The pair of shards, training and held-out, that covers one stretch of the sources."""

    def __init__(self, folder: Path, number: int, tokenizer: Tokenizer) -> None:
        self._folder, self._number, self._dtype = folder, number, tokenizer.dtype
        self._writers: dict[str, IndexedWriter] = {}
        self._text_bytes: dict[str, int] = {}
        self.documents = 0
        self.empty = 0

    def add(self, encoded: Encoded) -> None:
        self.empty += encoded.empty
        for name, split in encoded.splits.items():
            if len(split.lengths) == 0:
                continue
            if name not in self._writers:
                self._writers[name] = IndexedWriter(self._folder / self._name(name), self._dtype)
            self._writers[name].add(split.tokens, split.lengths)
            self._text_bytes[name] = self._text_bytes.get(name, 0) + split.text_bytes
            self.documents += len(split.lengths)

    def _name(self, split: str) -> str:
        return f"{split}-{self._number:05d}"

    def tokens(self, split: str | None = None) -> int:
        return sum(writer.tokens for name, writer in self._writers.items() if split in (None, name))

    @property
    def text_bytes(self) -> int:
        return sum(self._text_bytes.values())

    def finish(self, state: State, source: int, position: Any) -> None:
        """Put both shards and then the state that names them on the disk."""
        for name, writer in self._writers.items():
            state.add(name, Shard.of(self._name(name), writer.finish()), self._text_bytes[name])
        state.part, state.source, state.position = self._number + 1, source, position
        state.empty += self.empty
        state.save(self._folder)

    def abandon(self) -> None:
        for writer in self._writers.values():
            writer.abandon()


def _write_shards(
    folder: Path, state: State, sources: list[Source], tokenizer: Tokenizer, workers: int, view: Watch
) -> None:
    """Go on from `state` to the end of the sources, or to max_tokens."""
    limit, shard_tokens = state.identity["max_tokens"], state.identity["shard_tokens"]
    part = _Part(folder, state.part, tokenizer)
    batches = _batches(sources, state.source, state.position)
    try:
        for encoded in encode_all(batches, folder / TOKENIZER, state.identity["validation_fraction"], workers):
            part.add(encoded)
            source, position = encoded.position
            counts = state.documents + part.documents, state.tokens + part.tokens()
            view.update(*counts, state.text_bytes + part.text_bytes, _fraction_read(sources, source))
            enough = limit is not None and state.splits["train"].tokens + part.tokens("train") >= limit
            if part.tokens("train") >= shard_tokens or enough:
                part.finish(state, source, position)
                view.say(f"shard {state.part - 1}: {state.documents:,} documents, {state.tokens:,} tokens so far")
                part = _Part(folder, state.part, tokenizer)
            if enough:
                return
        if part.documents or part.empty:
            part.finish(state, len(sources), None)
    except BaseException:
        part.abandon()
        raise
    if not state.splits["train"].documents:
        held_out = state.splits["validation"].documents
        what = f"{state.empty} empty and {held_out} held-out documents, and none to train on."
        raise UserError("sources", [source.spec for source in sources], what, "Check the field, or give more text.")


def _batches(sources: list[Source], first: int, position: Any) -> Iterator[Batch]:
    """All batches from `position` of source `first` on; their own positions say which source they are of."""
    for index in range(first, len(sources)):
        for batch in sources[index].batches(position if index == first else None):
            yield replace(batch, position=(index, batch.position))


def _fraction_read(sources: list[Source], index: int) -> float | None:
    read = sources[index].fraction_read()
    return None if read is None else (index + read) / len(sources)


def _manifest(state: State, tokenizer: Tokenizer, sources: Sequence[str]) -> Manifest:
    card = TokenizerCard(
        kind=tokenizer.kind,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        folder=TOKENIZER,
    )
    return Manifest(
        format=FORMAT,
        qatscale=qatscale.__version__,
        dtype=tokenizer.dtype.name,
        tokenizer=card,
        sources=list(sources),
        identity=state.identity,
        empty_documents=state.empty,
        splits=state.splits,
    )


def _told(manifest: Manifest) -> str:
    parts = [f"{split} {c.documents:,} documents, {c.tokens:,} tokens" for split, c in manifest.splits.items()]
    empty = f"; {manifest.empty_documents:,} empty documents left out" if manifest.empty_documents else ""
    none = "" if manifest.splits["validation"].documents else "; nothing was held out: no validation is possible"
    return "; ".join(parts) + empty + none
