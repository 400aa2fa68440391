"""What `qatscale prepare` reads: local files, Hugging Face datasets and the embedded corpus, each as a stream."""

from __future__ import annotations

import abc
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatscale.config.amounts import parse_amount
from qatscale.config.places import expand_user
from qatscale.data import selfcorpus
from qatscale.data.records import (
    COMPRESSIONS,
    JSON_LINES,
    TEXT,
    FileReader,
    Origin,
    Record,
    Unit,
    data_extension,
    missing_field,
)
from qatscale.errors import UserError, nearest

SELF = "self"
"""The name of the embedded corpus; `self:30M` is at most 30 MB of it."""
BATCH_BYTES = 1 << 20
"""Bytes (or characters) of records that are tokenized together."""
_SAMPLE_SHARE = 1 << 18
"""Least bytes that a file contributes to the tokenizer's sample, so that a small sample opens few files."""
_EDGE = 1 << 16
_KINDS = f"Kinds that are read: {', '.join(JSON_LINES + TEXT)}, each also with {', '.join(COMPRESSIONS)}; .parquet."


@dataclass(frozen=True)
class SourceOptions:
    field: str = "text"
    split: str = "train"
    text_unit: Unit = "file"


@dataclass(frozen=True)
class Batch:
    records: list[Record]
    position: Any
    """Where reading continues after them, for `batches(position)` of the same source; JSON."""

    def texts(self) -> Iterator[str]:
        return (record.text() for record in self.records)


class Source(abc.ABC):
    """A stream of batches. Reading again gives the same batches; reading from a batch's position gives the rest."""

    spec: str
    fraction_read: float | None = None
    """For the progress bar; None = unknown."""

    @abc.abstractmethod
    def _records(self, position: Any) -> Iterator[tuple[list[Record], Any]]:
        """Groups of records from `position` on (None = the start), each with the position after it."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What distinguishes this source and its content from others; JSON, without absolute paths."""

    def batches(self, position: Any = None) -> Iterator[Batch]:
        records: list[Record] = []
        size = 0
        end = position
        for group, end in self._records(position):
            records += group
            size += sum(record.size for record in group)
            if size >= BATCH_BYTES:
                yield Batch(records, end)
                records, size = [], 0
        if records:
            yield Batch(records, end)

    def sample(self, size: int) -> Iterator[str]:
        """Documents of about `size` characters in all, the same ones each time. By default the first ones."""
        for batch in self.batches():
            for text in batch.texts():
                if size <= 0:
                    return
                size -= len(text)
                yield text


class LocalSource(Source):
    """Files one after another in the order of their names."""

    def __init__(self, spec: str, root: Path, files: list[Path], options: SourceOptions) -> None:
        self.spec, self._root, self.files, self._options = spec, root, files, options
        self._sizes = [file.stat().st_size for file in files]

    def without(self, seen: set[Any]) -> list[str]:
        """Drop the files that are in `seen`, to which the others are added; returns the names of those dropped."""
        kept: list[Path] = []
        dropped: list[Path] = []
        for file in self.files:
            status = file.stat()
            node = status.st_dev, status.st_ino
            (dropped if node in seen else kept).append(file)
            seen.add(node)
        self.files, self._sizes = kept, [file.stat().st_size for file in kept]
        return [str(file) for file in dropped]

    def identity(self) -> dict[str, Any]:
        """Covers each file's name, size and both ends: cheap, and enough to see that a file was replaced."""
        digest = hashlib.sha256()
        for path, size in zip(self.files, self._sizes, strict=True):
            with path.open("rb") as file:
                ends = hashlib.sha256(file.read(_EDGE))
                file.seek(max(0, size - _EDGE))
                ends.update(file.read(_EDGE))
            digest.update(json.dumps([path.relative_to(self._root).as_posix(), size, ends.hexdigest()]).encode())
        bytes_ = sum(self._sizes)
        return {"kind": "files", "files": len(self.files), "bytes": bytes_, "fingerprint": digest.hexdigest()}

    def _reader(self, index: int) -> FileReader:
        return FileReader(self.files[index], self._options.field, self._options.text_unit)

    def _records(self, position: Any) -> Iterator[tuple[list[Record], Any]]:
        start, skip = position or (0, 0)
        total = max(1, sum(self._sizes))
        for index in range(start, len(self.files)):
            reader, before = self._reader(index), sum(self._sizes[:index])
            for record in reader.records(skip if index == start else 0):
                self.fraction_read = (before + reader.raw_position) / total
                yield [record], [index, record.number]

    def sample(self, size: int) -> Iterator[str]:
        """From the starts of files spread evenly over all of them."""
        count = min(len(self.files), max(1, size // _SAMPLE_SHARE))
        for index in range(count):
            left = size // count
            for record in self._reader(index * len(self.files) // count).records():
                if left <= 0:
                    break
                text = record.text()
                left -= len(text)
                yield text


class HubSource(Source):
    """A dataset that `datasets` loads by name, streamed."""

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
            problem = "neither a local file or folder nor a dataset that `datasets` can load."
            raise UserError("source", self.spec, f"{problem} It says: {str(error).splitlines()[0]}") from None
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if self._options.field not in columns:
            raise missing_field(self._options.field, columns, self.spec)
        return dataset.select_columns([self._options.field])

    def _records(self, position: Any) -> Iterator[tuple[list[Record], Any]]:
        dataset = self._load()
        number, state = position or (0, None)
        if state is not None:
            dataset.load_state_dict(state)
        origin = Origin(self.spec, "value", self._options.field, "row")
        for rows in dataset.iter(self._ROWS):
            values = rows[self._options.field]
            records = [Record(value, index, origin) for index, value in enumerate(values, start=number + 1)]
            number += len(records)
            yield records, [number, dataset.state_dict()]


class SelfSource(Source):
    def __init__(self, spec: str) -> None:
        self.spec = spec
        amount = spec.partition(":")[2]
        try:
            self._size = parse_amount(amount) if amount else selfcorpus.DEFAULT_BYTES
        except ValueError as error:
            raise UserError("source", spec, f"{error}.", "Write self or, for example, self:30M.") from None

    def identity(self) -> dict[str, Any]:
        return {"kind": "self", "bytes": self._size, "fingerprint": selfcorpus.fingerprint()}

    def _records(self, position: Any) -> Iterator[tuple[list[Record], Any]]:
        origin = Origin(self.spec, "value", "text", "document")
        texts = selfcorpus.documents(self._size)
        for number in range((position or 0) + 1, len(texts) + 1):
            self.fraction_read = number / len(texts)
            yield [Record(texts[number - 1], number, origin)], number


def open_sources(specs: Sequence[str], options: SourceOptions) -> tuple[list[Source], list[str]]:
    """The sources without repetitions, and what was named more than once: files (also through links) and names."""
    sources: list[Source] = []
    repeated: list[str] = []
    seen: set[Any] = set()
    for spec in specs:
        source = open_source(spec, options)
        if isinstance(source, LocalSource):
            repeated += source.without(seen)
        elif spec in seen:
            repeated.append(spec)
            continue
        seen.add(spec)
        if not isinstance(source, LocalSource) or source.files:
            sources.append(source)
    return sources, list(dict.fromkeys(repeated))


def open_source(spec: str, options: SourceOptions) -> Source:
    """`self`, a file, a folder, a glob, or else the name of a dataset (`owner/name`, `owner/name:config`).

    Raises UserError for a path or glob without a file, and for files of an unknown kind.
    """
    if spec == SELF or spec.startswith(SELF + ":"):
        return SelfSource(spec)
    path = expand_user(Path(spec))
    if path.is_dir():
        return LocalSource(spec, path, _in_folder(path), options)
    if path.exists():
        return LocalSource(spec, path.parent, [_readable(path)], options)
    if any(sign in spec for sign in "*?["):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - absolute too
        files = [_readable(file) for file in found if file.is_file()]
        if not files:
            raise UserError("source", spec, "no file matches.", "Quote the pattern so that the shell leaves it alone.")
        root = Path(os.path.commonpath([file.parent for file in files]))
        return LocalSource(spec, root, files, options)
    # datasets are called `name` or `owner/name`
    names_file = data_extension(path) or path.suffix.lower() in COMPRESSIONS or spec.endswith("/")
    if names_file or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else None
        fix = f"Did you mean {str(path.with_name(near))!r}?" if near else ""
        raise UserError("source", spec, "no such file or folder.", fix)
    return HubSource(spec, options)


def _in_folder(folder: Path) -> list[Path]:
    """Every readable file below `folder` in the order of the names, without hidden ones."""
    relative = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    readable = [folder / path for path in sorted(visible, key=Path.as_posix) if data_extension(path)]
    if not readable:
        found = ", ".join(sorted({path.suffix or path.name for path in visible})) or "nothing"
        raise UserError("source", str(folder), f"holds no file that can be read (found {found}).", _KINDS)
    return readable


def _readable(file: Path) -> Path:
    if not data_extension(file):
        ending = "".join(file.suffixes[-2:]) if file.suffix.lower() in COMPRESSIONS else file.suffix
        raise UserError("source", str(file), f"files of kind {ending or 'no ending'!r} are not read.", _KINDS)
    return file
