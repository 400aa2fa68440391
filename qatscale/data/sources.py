"""What `qatscale prepare` takes: local files, Hugging Face data sets, and the embedded corpus, all as streams."""

from __future__ import annotations

import abc
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatscale.config.amounts import parse_amount
from qatscale.data.files import COMPRESSIONS, JSON_LINES, KNOWN, TEXT, FileReader, data_extension, edge_fingerprint
from qatscale.data.records import BATCH_BYTES, Batch, Piece, Record, Unit, missing_field, size_of
from qatscale.errors import UserError, nearest

SELF = "self"
"""The name of the embedded corpus; `self:30M` = with at most that many bytes."""
_SAMPLE_SHARE = 1 << 18
"""Bytes that a file gives to the tokenizer's sample at least, so that few bytes come from few files."""


@dataclass(frozen=True)
class SourceOptions:
    field: str = "text"
    split: str = "train"
    text_unit: Unit = "file"


class Source(abc.ABC):
    """A stream of batches. The same source gives the same batches, and from a batch's position on the same rest."""

    spec: str

    @abc.abstractmethod
    def batches(self, position: Any = None) -> Iterator[Batch]:
        """From `position` on (None = the start)."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this source from another, or from itself with other content; JSON, no absolute paths."""

    def sample(self, size: int) -> Iterator[str]:
        """Documents, about `size` characters in all, always the same ones. Here: the first ones."""
        for batch in self.batches():
            for text in batch.texts():
                if size <= 0:
                    return
                size -= len(text)
                yield text

    def fraction_read(self) -> float | None:
        """How much of it was read, for the progress bar; None = nobody knows."""
        return None


class LocalSource(Source):
    """Files one after another in the order of their names."""

    def __init__(self, spec: str, root: Path, files: list[Path], options: SourceOptions) -> None:
        self.spec, self._root, self._files, self._options = spec, root, files, options
        self._sizes = [file.stat().st_size for file in files]
        self._reading: tuple[int, FileReader] | None = None

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for file in self._files:
            name = file.relative_to(self._root).as_posix()
            digest.update(json.dumps([name, *edge_fingerprint(file)]).encode())
        return {
            "kind": "files",
            "files": len(self._files),
            "bytes": sum(self._sizes),
            "fingerprint": digest.hexdigest(),
        }

    def _reader(self, index: int) -> FileReader:
        return FileReader(self._files[index], self._options.field, self._options.text_unit)

    def batches(self, position: Any = None) -> Iterator[Batch]:
        start, skip = position or (0, 0)
        pieces: list[Piece] = []
        gathered = 0
        for index in range(start, len(self._files)):
            reader = self._reader(index)
            self._reading = index, reader
            records: list[Record] = []
            piece = Piece(str(reader.path), reader.kind, self._options.field, reader.unit, records)
            for record in reader.records(skip if index == start else 0):
                records.append(record)
                gathered += size_of(record.payload)
                if gathered >= BATCH_BYTES:
                    yield Batch([*pieces, piece], [index, record.number])
                    pieces, gathered, records = [], 0, []
                    piece = Piece(str(reader.path), reader.kind, self._options.field, reader.unit, records)
            if records:
                pieces.append(piece)
        if pieces:
            yield Batch(pieces, [len(self._files), 0])

    def sample(self, size: int) -> Iterator[str]:
        """From the starts of files spread evenly over all of them."""
        count = min(len(self._files), max(1, size // _SAMPLE_SHARE))
        for index in range(count):
            reader, left = self._reader(index * len(self._files) // count), size // count
            for record in reader.records():
                if left <= 0:
                    break
                piece = Piece(str(reader.path), reader.kind, self._options.field, reader.unit, [record])
                text = next(piece.texts())
                left -= len(text)
                yield text

    def fraction_read(self) -> float | None:
        if self._reading is None:
            return 0.0
        index, reader = self._reading
        return (sum(self._sizes[:index]) + reader.raw_position) / max(1, sum(self._sizes))


class HubSource(Source):
    """A data set that `datasets` loads by name, streamed."""

    _ROWS = 256

    def __init__(self, spec: str, options: SourceOptions) -> None:
        self.spec = spec
        self._name, _, config = spec.partition(":")
        self._config = config or None
        self._options = options

    def identity(self) -> dict[str, Any]:
        return {"kind": "datasets", "name": self._name, "config": self._config, "split": self._options.split}

    def _load(self) -> Any:
        import datasets

        try:
            dataset = datasets.load_dataset(self._name, self._config, split=self._options.split, streaming=True)
        except (datasets.exceptions.DatasetNotFoundError, ValueError, OSError) as error:
            allowed = "neither a file or folder here, nor a data set that `datasets` can load."
            raise UserError("source", self.spec, f"{allowed} It says: {str(error).splitlines()[0]}") from None
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if self._options.field not in columns:
            raise missing_field(self._options.field, columns, self.spec)
        return dataset.select_columns([self._options.field])

    def batches(self, position: Any = None) -> Iterator[Batch]:
        dataset = self._load()
        number, state = position or (0, None)
        if state is not None:
            dataset.load_state_dict(state)
        records: list[Record] = []
        gathered = 0
        for rows in dataset.iter(self._ROWS):
            for value in rows[self._options.field]:
                number += 1
                gathered += size_of(value)
                records.append(Record(value, number))
            if gathered >= BATCH_BYTES:
                yield self._batch(records, [number, dataset.state_dict()])
                records, gathered = [], 0
        if records:
            yield self._batch(records, [number, dataset.state_dict()])

    def _batch(self, records: list[Record], position: Any) -> Batch:
        return Batch([Piece(self.spec, "value", self._options.field, "row", records)], position)


class SelfSource(Source):
    """The embedded corpus: what is on the machine anyway (see `selfcorpus`)."""

    def __init__(self, spec: str) -> None:
        from qatscale.data import selfcorpus

        self.spec = spec
        amount = spec.partition(":")[2]
        try:
            self._size = parse_amount(amount) if amount else selfcorpus.DEFAULT_BYTES
        except ValueError as error:
            raise UserError("source", spec, f"{error}.", "Write self or, for example, self:30M.") from None
        self._read = 0.0

    def identity(self) -> dict[str, Any]:
        from qatscale.data import selfcorpus

        return {"kind": "self", "bytes": self._size, "fingerprint": selfcorpus.fingerprint()}

    def batches(self, position: Any = None) -> Iterator[Batch]:
        from qatscale.data import selfcorpus

        texts = selfcorpus.documents(self._size)
        records: list[Record] = []
        gathered = 0
        for number, text in enumerate(texts, start=1):
            if number <= (position or 0):
                continue
            records.append(Record(text, number))
            gathered += len(text)
            if gathered >= BATCH_BYTES or number == len(texts):
                self._read = number / len(texts)
                yield Batch([Piece(self.spec, "value", "text", "document", records)], number)
                records, gathered = [], 0

    def fraction_read(self) -> float | None:
        return self._read


def open_source(spec: str, options: SourceOptions) -> Source:
    """`self`, a file, a folder, a glob, or else the name of a data set (`owner/name`, `owner/name:config`).

    Raises UserError for a path or glob that finds nothing and for files of an unknown kind.
    """
    if spec == SELF or spec.startswith(SELF + ":"):
        return SelfSource(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return LocalSource(spec, path, _in_folder(path), options)
    if path.exists():
        return LocalSource(spec, path.parent, [_known(path)], options)
    if any(sign in spec for sign in "*?["):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - absolute too
        files = [_known(file) for file in found if file.is_file()]
        if not files:
            raise UserError("source", spec, "no file matches.", "Quote the pattern so that the shell leaves it alone.")
        root = Path(os.path.commonpath([file.parent for file in files]))
        return LocalSource(spec, root, files, options)
    if _means_a_file(spec, path):
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else None
        do = f"Did you mean {str(path.with_name(near))!r}?" if near else ""
        raise UserError("source", spec, "there is no such file or folder.", do)
    return HubSource(spec, options)


def _means_a_file(spec: str, path: Path) -> bool:
    """Whether a name under which nothing lies cannot be meant as that of a data set, `name` or `owner/name`."""
    by_ending = data_extension(path) or path.suffix.lower() in COMPRESSIONS or spec.endswith("/")
    return bool(by_ending) or spec.startswith((".", "/", "~")) or spec.count("/") > 1


def _in_folder(folder: Path) -> list[Path]:
    """Every file below `folder` that can be read, hidden ones left out, in the order of their names."""
    hidden = [p for p in folder.rglob("*") if p.is_file()]
    files = [p for p in hidden if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    known = sorted((p for p in files if data_extension(p)), key=lambda p: p.relative_to(folder).as_posix())
    if not known:
        there = ", ".join(sorted({p.suffix or p.name for p in files})) or "nothing"
        raise UserError("source", str(folder), f"holds no file that can be read (found {there}).", _kinds())
    return known


def _known(file: Path) -> Path:
    if not data_extension(file):
        ending = "".join(file.suffixes[-2:]) if file.suffix.lower() in COMPRESSIONS else file.suffix
        raise UserError("source", str(file), f"files of kind {ending or 'no ending'!r} are not read.", _hint(file))
    return file


def _hint(file: Path) -> str:
    near = nearest(file.suffix, KNOWN)
    return f"Did you mean {near!r}? {_kinds()}" if near else _kinds()


def _kinds() -> str:
    compressed = f"{', '.join(JSON_LINES + TEXT)}, each also with {', '.join(COMPRESSIONS)}"
    return f"Kinds that are read: {compressed}; .parquet."
