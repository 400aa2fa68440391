"""Records: what local files and datasets are cut into, and the documents that they hold.

The reading process only cuts files into records. Tokenizing processes parse and decode them in parallel. A record knows
its file and number, so that an error names the place.

JSON lines and text are not read through `datasets`: it types every column from the first lines, cannot name the
position of a bad byte, and accepts a .zst file that was cut off. pyarrow reads Parquet and .zst.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from qatscale.errors import UserError, did_you_mean

Unit = Literal["file", "paragraph", "line"]

COMPRESSIONS = (".gz", ".xz", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
TEXT = (".txt", ".text")
LARGEST_DOCUMENT = 256 << 20
"""Bytes that are accepted as one document, or as the line of JSON around it."""
MOST_CONTAINERS = 10_000_000
"""Brackets in a line of JSON: as objects they take up to 64 bytes each."""
_CHUNK = 1 << 20
_ROWS = 256


@dataclass(frozen=True)
class Origin:
    """What the records of one file or dataset have in common."""

    name: str
    """The file or dataset, as errors name it."""
    kind: Literal["jsonl", "text", "value"]
    field: str
    unit: str
    """What a record is called: line, paragraph, row, ..."""


class Record(NamedTuple):
    payload: Any
    """A line of JSON or a piece of text, as bytes; for the kind `value`, a field's value of any type."""
    number: int
    """Counted from 1 within its file."""
    origin: Origin

    @property
    def size(self) -> int:
        return len(self.payload) if isinstance(self.payload, bytes | str) else 8

    def text(self) -> str:
        """The document; "" for an empty one. Raises UserError that names the place."""
        try:
            value = self._value()
            if value is None:
                return ""
            if not isinstance(value, str):
                raise self._error(f"field {self.origin.field!r} holds a {type(value).__name__}, not text.")
            value.encode()  # JSON can spell a lone surrogate, which is not text
            return value
        except UnicodeEncodeError as error:
            raise self._error(f"half a surrogate pair at character {error.start} is not text.") from None
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
            fix = "Convert the file: iconv -f ENCODING -t UTF-8"
            raise self._error(f"{byte} of this {self.origin.unit} is not UTF-8.", fix) from None

    def _value(self) -> Any:
        if self.origin.kind == "value":
            return self.payload
        text = self.payload.decode("utf-8-sig")
        if self.origin.kind == "text":
            return text
        if not text.strip():
            return ""
        fix = "Write one JSON object per line."
        if self.number == 1 and text.lstrip().startswith("["):
            fix = "The file seems to be one JSON array. Write one object per line: jq -c '.[]' FILE > FILE.jsonl"
        if text.count("[") + text.count("{") > MOST_CONTAINERS:
            raise self._error(f"more than {MOST_CONTAINERS:,} lists and objects, too many for one document.")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(f"not JSON: {error}.", fix) from None
        if not isinstance(row, dict):
            raise self._error(f"a JSON {type(row).__name__}, not an object with fields.", fix)
        if self.origin.field not in row:
            raise missing_field(self.origin.field, list(row), self._place)
        return row[self.origin.field]

    @property
    def _place(self) -> str:
        origin = self.origin
        return origin.name if origin.unit == "file" else f"{origin.name}, {origin.unit} {self.number}"

    def _error(self, problem: str, fix: str = "") -> UserError:
        return UserError("source", self._place, problem, fix)


def missing_field(field: str, fields: list[str], place: str) -> UserError:
    fix = did_you_mean(field, fields) if fields else ""
    return UserError("field", field, f"{place} has the fields {', '.join(fields) or 'none'}.", fix)


def data_extension(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`; "" for a file that cannot be read."""
    suffixes, readable = [suffix.lower() for suffix in path.suffixes[-2:]], [*JSON_LINES, *TEXT, ".parquet"]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        readable.remove(".parquet")
    return suffixes[-1] if suffixes and suffixes[-1] in readable else ""


class FileReader:
    """The records of one file. `raw_position` counts the bytes that were read from the disk."""

    def __init__(self, path: Path, field: str, text_unit: Unit) -> None:
        self.path, self.raw_position = path, 0
        extension = data_extension(path)
        if extension in JSON_LINES:
            self.origin = Origin(str(path), "jsonl", field, "line")
        elif extension in TEXT:
            self.origin = Origin(str(path), "text", field, text_unit)
        else:
            self.origin = Origin(str(path), "value", field, "row")

    def records(self, skip: int = 0) -> Iterator[Record]:
        """All records but the first `skip`. Raises UserError for a file that cannot be read to its end."""
        payloads = self._rows() if self.origin.kind == "value" else self._pieces()
        try:
            for number, payload in enumerate(payloads, start=1):
                if number > skip:
                    yield Record(payload, number, self.origin)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.strerror:
                raise UserError("source", str(self.path), f"cannot be read: {error.strerror}.") from None
            problem = f"the compressed file is damaged or cut off ({error})."
            raise UserError("source", str(self.path), problem, "Download or copy it again.") from None

    def _pieces(self) -> Iterator[bytes]:
        with self.path.open("rb") as raw, _decompressed(raw, self.path.suffix.lower()) as stream:
            pieces: Iterable[bytes] = _lines(stream)
            if self.origin.unit == "file":
                pieces = filter(None, [stream.read(LARGEST_DOCUMENT + 1)])
            elif self.origin.unit == "paragraph":
                pieces = _paragraphs(stream)
            for number, piece in enumerate(pieces, start=1):
                if len(piece) > LARGEST_DOCUMENT:
                    raise self._too_large(number)
                self.raw_position = raw.tell()
                yield piece

    def _too_large(self, number: int) -> UserError:
        place = str(self.path) if self.origin.unit == "file" else f"{self.path}, {self.origin.unit} {number}"
        fix = "Split it, or set text_unit=paragraph or text_unit=line." if self.origin.kind == "text" else "Split it."
        return UserError("source", place, f"more than {LARGEST_DOCUMENT >> 20} MB, too much for one document.", fix)

    def _rows(self) -> Iterator[Any]:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        number, field = 0, self.origin.field
        try:
            schema = pq.read_schema(self.path)
            if field not in schema.names:
                raise missing_field(field, schema.names, str(self.path))
            # as a dictionary: a text that occurs in every row is in memory once
            is_text = schema.field(field).type in (pa.string(), pa.binary())
            with pq.ParquetFile(self.path, buffer_size=_CHUNK, read_dictionary=[field] * is_text) as file:
                for rows in file.iter_batches(_ROWS, columns=[field], use_threads=False):
                    for value in rows.column(0):
                        number += 1
                        if isinstance(text := value.as_py(), str | bytes) and len(text) > LARGEST_DOCUMENT:
                            raise self._too_large(number)
                        yield text
                    self.raw_position = int(self.path.stat().st_size * number / file.metadata.num_rows)
        except UnicodeDecodeError as error:
            place = f"{self.path}, row {number}"
            problem = f"byte 0x{error.object[error.start]:02x} is not UTF-8."
            raise UserError("source", place, problem, "Write the column again.") from None
        except pa.ArrowInvalid as error:
            raise UserError("source", str(self.path), f"not a readable Parquet file ({error}).") from None


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines; a piece of one that is too long for a document, after which reading has to end."""
    return iter(functools.partial(stream.readline, LARGEST_DOCUMENT + 1), b"")


def _paragraphs(stream: BinaryIO) -> Iterator[bytes]:
    """Runs of lines between blank lines; a piece of one that is too long for a document."""
    lines: list[bytes] = []
    size = 0
    for line in _lines(stream):
        if line.strip():
            lines.append(line)
            size += len(line)
        if lines and (size > LARGEST_DOCUMENT or not line.strip()):
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    """The plain bytes. The large buffer matters: iterating over the lines of gzip and lzma is several times slower."""
    if suffix not in COMPRESSIONS:
        return raw
    stream: Any
    if suffix == ".gz":
        stream = gzip.GzipFile(fileobj=raw)
    elif suffix == ".xz":
        stream = lzma.open(raw)  # noqa: SIM115 - closed with its buffer
    else:
        import pyarrow as pa

        stream = pa.CompressedInputStream(raw, "zstd")  # zstandard's reader accepts a frame without its end
    return cast(BinaryIO, io.BufferedReader(stream, _CHUNK))
