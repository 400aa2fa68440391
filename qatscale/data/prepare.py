"""From sources of text to a folder of token shards: `prepare`.

Memory stays bounded. The folder holds the same bytes for any number of workers and any number of interruptions: the
reader alone cuts the batches, they return in their order, and shards end where a batch ends. After each pair of shards
`progress.json` says where the sources continue.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import qatscale
from qatlaw.files import naming
from qatlaw.text import listed, plural
from qatscale.data import state as states
from qatscale.data.encode import Encoded, encode_all, is_validation
from qatscale.data.held_out import hold_out
from qatscale.data.indexed_writer import IndexedWriter
from qatscale.data.manifest import Manifest, SplitCounts, TokenizerCard
from qatscale.data.records import Unit
from qatscale.data.sources import Batch, Source, SourceOptions, open_sources
from qatscale.data.state import TOKENIZER, State
from qatscale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from qatscale.errors import UserError
from qatscale.files import only_process

VOCABULARY = 32_000
SAMPLE_BYTES = 50_000_000
SHARD_TOKENS = 1 << 28


class _Watch:
    """What a person sees: a bar on a terminal, a line per shard in a log, nothing without a console."""

    def __init__(self, console: Console | None) -> None:
        self._console = console or Console(quiet=True)
        columns = (BarColumn(bar_width=None), TextColumn("{task.description}"), TimeElapsedColumn())
        hidden = console is None or not console.is_terminal
        left = (TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(*columns, *left, console=self._console, transient=True, disable=hidden)
        self._task = self.bar.add_task("", total=None)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, documents: int, tokens: int, fraction: float | None) -> None:
        """Totals so far; `fraction` of the sources read, None = unknown."""
        text = f"{plural(documents, 'document')}  {tokens:,} tokens"
        total = None if fraction is None else 1.0
        self.bar.update(self._task, description=text, total=total, completed=fraction or 0.0)


def prepare(
    sources: Sequence[str],
    out: Path | str,
    *,
    field: str = "text",
    split: str = "train",
    text_unit: Unit = "file",
    tokenizer: str | None = None,
    eos: str | None = None,
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

    After a kill the same call continues from the last finished shards. On a finished folder it returns at once.
    Sources, which are read one after another, and most options are those of the command `qatscale prepare`.

    text_unit: a paragraph ends at a blank line.
    sample_bytes: text to train a tokenizer on, without held-out documents, taken evenly from the sources and files.
    validation_fraction: 0 = nothing is held out; else at least one of several documents is.
    shard_tokens: training tokens after which a pair of shards ends.
    max_tokens: stop soon after this many training tokens; None = read everything.
    console: where to show progress; None = nowhere.

    Raises UserError for wrong sources or options, and where `out` holds something else.
    """
    if not sources:
        raise UserError("sources", None, "name at least one.", "Give a file, a folder, a dataset's name, or self.")
    if text_unit not in get_args(Unit):
        raise UserError("text_unit", text_unit, f"must be one of {', '.join(get_args(Unit))}.")
    if tokenizer is not None and vocab_size is not None:
        raise UserError("vocab_size", vocab_size, "a given tokenizer has its own.", "Leave out one of the two.")
    if eos is not None and tokenizer is None:
        raise UserError("eos", eos, "has no effect on a tokenizer that is trained here.", "Leave it out.")
    if not 0 <= validation_fraction <= 0.5:
        raise UserError("validation_fraction", validation_fraction, "must be 0 to 0.5.", "1 % is usual: 0.01")
    counts = {"vocab_size": vocab_size, "sample_bytes": sample_bytes, "shard_tokens": shard_tokens}
    for name, value in (counts | {"max_tokens": max_tokens, "workers": workers}).items():
        if value is not None and value < 1:
            raise UserError(name, value, "must be 1 or more.")
    opened, repeated = open_sources(sources, SourceOptions(field, split, text_unit))
    given = load_tokenizer(tokenizer, eos) if tokenizer is not None else None
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
        problem = "is a file." if folder.is_file() else f"cannot be made: {error.strerror}."
        raise UserError("out", str(folder), problem, "Choose a new folder.") from None
    states.refuse_strangers(folder)  # before the lock's file exists
    view = _Watch(console)
    if repeated:
        view.say(f"note: named more than once, read once: {listed(repeated)}")
    with naming(folder), only_process(folder, "out"), view.bar:
        if restart:
            states.discard(folder)
        manifest = states.finished(folder, identity)
        if manifest is not None:
            (folder / states.NAME).unlink(missing_ok=True)  # of a process that ended right after the manifest
            view.say(f"{folder} is prepared already: {manifest.summary()}")
            return manifest
        state = states.resume(folder, identity)
        if state.part:
            view.say(f"{folder}: continuing after shard {state.part - 1} ({state.tokens:,} tokens)")
        state.save(folder)
        used = _tokenizer(folder, given, opened, identity, view)
        workers = workers or len(os.sched_getaffinity(0))
        _write_shards(folder, state, opened, used, workers, view)
        manifest = Manifest(
            qatscale=qatscale.__version__, dtype=used.dtype.name,
            tokenizer=TokenizerCard(**used.card, folder=TOKENIZER), sources=list(sources), identity=state.identity,
            empty_documents=state.empty, splits=_with_validation(folder, state),
        )  # fmt: skip
        manifest.save(folder)
        (folder / states.NAME).unlink()
        view.say(f"{folder}: {manifest.summary()}")
        return manifest


def _with_validation(folder: Path, state: State) -> dict[Any, SplitCounts]:
    """The splits. Where a share is asked for and the hashes of few documents chose none, one document is held out."""
    train, fraction = state.splits["train"], state.identity["validation_fraction"]
    if state.splits["validation"].documents or not fraction or train.documents < 2:
        return state.splits
    return {**hold_out(folder, train.shards, fraction)}


def _tokenizer(
    folder: Path, given: Tokenizer | None, sources: list[Source], identity: dict[str, Any], view: _Watch
) -> Tokenizer:
    """The one in the folder, else the given one, else a new one. Saves it in the folder."""
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
    """A pair of shards, training and held-out, with the documents of one stretch of the sources."""

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
                self._writers[name] = IndexedWriter(self._folder / f"{name}-{self._number:05d}", self._dtype)
            self._writers[name].add(split.tokens, split.lengths)
            self._text_bytes[name] = self._text_bytes.get(name, 0) + split.text_bytes
            self.documents += len(split.lengths)

    def tokens(self, split: str | None = None) -> int:
        return sum(writer.tokens for name, writer in self._writers.items() if split in (None, name))

    def finish(self, state: State, source: int, position: Any) -> None:
        """Write both shards and then the state that names them."""
        for name, writer in self._writers.items():
            state.add(name, writer.finish(), self._text_bytes[name])
        state.part, state.source, state.position = self._number + 1, source, position
        state.empty += self.empty
        state.save(self._folder)


def _write_shards(
    folder: Path, state: State, sources: list[Source], tokenizer: Tokenizer, workers: int, view: _Watch
) -> None:
    """Continue from `state` to the end of the sources, or to max_tokens."""
    limit, shard_tokens = state.identity["max_tokens"], state.identity["shard_tokens"]
    part = _Part(folder, state.part, tokenizer)
    batches = _batches(sources, state.source, state.position)
    for encoded in encode_all(batches, folder / TOKENIZER, state.identity["validation_fraction"], workers):
        part.add(encoded)
        source, position = encoded.position
        read = sources[source].fraction_read
        fraction = None if read is None else (source + read) / len(sources)
        view.update(state.documents + part.documents, state.tokens + part.tokens(), fraction)
        enough = limit is not None and state.splits["train"].tokens + part.tokens("train") >= limit
        if part.tokens("train") >= shard_tokens or enough:
            part.finish(state, source, position)
            view.say(f"shard {state.part - 1}: {plural(state.documents, 'document')}, {state.tokens:,} tokens so far")
            part = _Part(folder, state.part, tokenizer)
        if enough:
            return
    if part.documents or part.empty:
        part.finish(state, len(sources), None)
    if not state.splits["train"].documents:
        held_out = state.splits["validation"].documents
        problem = f"hold {state.empty} empty and {held_out} held-out documents, and none to train on."
        raise UserError("sources", [source.spec for source in sources], problem, "Check the field, or give more text.")


def _batches(sources: list[Source], first: int, position: Any) -> Iterator[Batch]:
    """All batches from `position` of source `first` on; their positions name the source too."""
    for index in range(first, len(sources)):
        for batch in sources[index].batches(position if index == first else None):
            yield replace(batch, position=(index, batch.position))
