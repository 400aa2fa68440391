"""Reading local files as streams of records, in bounded memory, from any record on.

JSON lines and text are read here and not through `datasets`: it types every column from the first lines (another
column that changes its type further down stops the whole file, text that looks like dates becomes dates), cannot say
where a bad byte is, and takes a .zst file that was cut off for a whole one. Parquet is read by pyarrow.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from qatscale.data.records import Kind, Record, Unit, missing_field
from qatscale.errors import UserError

COMPRESSIONS = (".gz", ".xz", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
TEXT = (".txt", ".text")
PARQUET = (".parquet",)
KNOWN = (*JSON_LINES, *TEXT, *PARQUET)
LARGEST_TEXT_FILE = 256 << 20
"""Bytes of text that are taken as one document."""
_CHUNK = 1 << 20
_ROWS = 256


def data_extension(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`; "" where it is none that can be read."""
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in JSON_LINES + TEXT else ""
    return suffixes[-1] if suffixes and suffixes[-1] in KNOWN else ""


@dataclass
class FileReader:
    """The records of one file. `raw_position` tells how many bytes of it (as they lie on the disk) were read."""

    path: Path
    field: str
    text_unit: Unit
    raw_position: int = 0

    @property
    def kind(self) -> Kind:
        extension = data_extension(self.path)
        return "jsonl" if extension in JSON_LINES else "value" if extension in PARQUET else "text"

    @property
    def unit(self) -> str:
        return {"jsonl": "line", "value": "row", "text": self.text_unit}[self.kind]

    def records(self, skip: int = 0) -> Iterator[Record]:
        """Records from the one after the first `skip` on. Raises UserError for a file that cannot be read whole."""
        try:
            if self.kind == "value":
                yield from self._rows(skip)
            else:
                yield from self._pieces(skip)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, _ZstdError) as error:
            what = f"the compressed file is damaged or cut off ({error})."
            raise UserError("source", str(self.path), what, "Download or copy it again.") from None
        except OSError as error:
            raise UserError("source", str(self.path), f"cannot be read: {error.strerror or error}.") from None

    def _pieces(self, skip: int) -> Iterator[Record]:
        with self.path.open("rb") as raw, _decompressed(raw, self.path.suffix.lower()) as stream:
            units: Iterable[bytes] = stream
            if self.kind == "text" and self.text_unit == "file":
                units = _whole(stream, self.path)
            elif self.kind == "text" and self.text_unit == "paragraph":
                units = _paragraphs(stream)
            for number, payload in enumerate(units, start=1):
                if number > skip:
                    self.raw_position = raw.tell()
                    yield Record(payload, number)

    def _rows(self, skip: int) -> Iterator[Record]:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        try:
            with pq.ParquetFile(self.path, buffer_size=_CHUNK) as file:
                schema = file.schema_arrow
                if self.field not in schema.names:
                    raise missing_field(self.field, schema.names, str(self.path))
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                first, number = 0, 0
                while first < len(groups) and number + groups[first].num_rows <= skip:
                    number += groups[first].num_rows
                    first += 1
                wanted = list(range(first, len(groups)))
                for rows in file.iter_batches(_ROWS, row_groups=wanted, columns=[self.field], use_threads=False):
                    values = _python_values(rows.column(0), self.path, number)
                    for value in values:
                        number += 1
                        if number > skip:
                            yield Record(value, number)
                    self.raw_position = int(self.path.stat().st_size * number / max(1, file.metadata.num_rows))
        except pa.ArrowInvalid as error:
            raise UserError("source", str(self.path), f"no Parquet file that can be read ({error}).") from None


def _python_values(column: Any, path: Path, before: int) -> list[Any]:
    try:
        return cast(list[Any], column.to_pylist())
    except UnicodeDecodeError as error:
        place = f"{path}, rows {before + 1} to {before + len(column)}"
        byte = error.object[error.start]
        raise UserError("source", place, f"byte 0x{byte:02x} is not UTF-8.", "Write the column anew.") from None


def _whole(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    text = stream.read(LARGEST_TEXT_FILE + 1)
    if len(text) > LARGEST_TEXT_FILE:
        limit = f"more than {LARGEST_TEXT_FILE >> 20} MB of text is hardly one document."
        raise UserError("source", str(path), limit, "Say what is: text_unit=paragraph or text_unit=line.")
    if text:
        yield text


def _paragraphs(stream: BinaryIO) -> Iterator[bytes]:
    """Runs of lines between blank lines."""
    lines: list[bytes] = []
    for line in stream:
        if line.strip():
            lines.append(line)
        elif lines:
            yield b"".join(lines)
            lines = []
    if lines:
        yield b"".join(lines)


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    """The plain bytes, behind a large buffer: iterating over gzip's and lzma's own lines is several times slower."""
    opener: dict[str, Any] = {".gz": lambda f: gzip.GzipFile(fileobj=f), ".xz": lzma.LZMAFile, ".zst": _ZstdFile}
    if suffix not in opener:
        return raw
    return cast(BinaryIO, io.BufferedReader(opener[suffix](raw), _CHUNK))


class _ZstdError(Exception):
    pass


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file, and an error where the last one has no end.

    zstandard's own reader takes such a file as whole.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_CHUNK // 8)
                if not self._input:
                    if self._frame is not None:
                        raise _ZstdError("its last frame has no end")
                    return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._library.ZstdError as error:
                raise _ZstdError(str(error)) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(target), len(self._output))
        target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def edge_fingerprint(path: Path) -> list[Any]:
    """Size and checksum of both ends of a file: cheap, and enough to see that another file took its place."""
    import hashlib

    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)), os.SEEK_SET)
        digest.update(file.read(1 << 16))
    return [size, digest.hexdigest()]
