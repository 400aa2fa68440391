"""Raw records and their batches: what the reading process hands to the tokenizing processes.

The reader only cuts files into records (lines, mostly); parsing JSON and decoding happen where the tokenizing does, in
parallel. A record keeps its file and number, so that an error found there still names the place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qatscale.errors import UserError, did_you_mean

Kind = Literal["jsonl", "text", "value"]
Unit = Literal["file", "paragraph", "line"]

BATCH_BYTES = 1 << 20
"""Bytes (or characters) of records that travel together."""


class Record(NamedTuple):
    """`payload`: a line of JSON or a piece of text as bytes, or a field's value, whatever it is."""

    payload: Any
    number: int
    """Counted from 1 within its file: a line, a paragraph or a row."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring records of one file."""

    name: str
    """The file, or the data set, as an error names it."""
    kind: Kind
    field: str
    unit: str
    """What a record is called: line, paragraph, row, ..."""
    records: list[Record]

    def texts(self) -> Iterator[str]:
        """The document of each record; "" for an empty one. Raises UserError naming the place."""
        for record in self.records:
            try:
                yield _text(record, self)
            except UnicodeError as error:
                raise _not_utf8(self, record, error) from None


@dataclass(frozen=True)
class Batch:
    """Records to tokenize together, and where reading goes on after them."""

    pieces: list[Piece]
    position: Any
    """What `batches(position)` of the same source takes; JSON."""

    def texts(self) -> Iterator[str]:
        for piece in self.pieces:
            yield from piece.texts()


def size_of(payload: Any) -> int:
    return len(payload) if isinstance(payload, bytes | str) else 8


def _text(record: Record, piece: Piece) -> str:
    if piece.kind == "text":
        return bytes(record.payload).decode("utf-8-sig")
    if piece.kind == "value":
        return _string(record.payload, record, piece)
    if not record.payload.strip():
        return ""
    try:
        row = json.loads(record.payload.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise _refuse(piece, record, f"no JSON: {error.msg} at character {error.pos}.", _one_object(record)) from None
    if not isinstance(row, dict):
        raise _refuse(piece, record, f"a JSON {type(row).__name__}, no object with fields.", _one_object(record))
    if piece.field not in row:
        raise missing_field(piece.field, list(row), _place(piece, record))
    return _string(row[piece.field], record, piece)


def _string(value: Any, record: Record, piece: Piece) -> str:
    """A null is an empty document; anything else that is not text is an error."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _refuse(piece, record, f"field {piece.field!r} holds a {type(value).__name__}, not text.")
    value.encode()  # a lone surrogate, which JSON can spell, is not text either
    return value


def missing_field(field: str, fields: list[str], place: str) -> UserError:
    known = ", ".join(fields) or "none"
    return UserError("field", field, f"{place} has the fields {known}.", did_you_mean(field, fields) if fields else "")


def _place(piece: Piece, record: Record) -> str:
    return f"{piece.name}, {piece.unit} {record.number}" if piece.unit != "file" else piece.name


def _refuse(piece: Piece, record: Record, allowed: str, do: str = "") -> UserError:
    return UserError("source", _place(piece, record), allowed, do)


def _one_object(record: Record) -> str:
    if record.number == 1 and record.payload.lstrip().startswith(b"["):
        return "This file is one JSON array; write one object a line: jq -c '.[]' FILE > FILE.jsonl"
    return "Each line is one JSON object."


def _not_utf8(piece: Piece, record: Record, error: UnicodeError) -> UserError:
    if isinstance(error, UnicodeEncodeError):
        return _refuse(piece, record, f"half a surrogate pair at character {error.start}: not text.", "Mend it.")
    assert isinstance(error, UnicodeDecodeError)
    byte = error.object[error.start]
    allowed = f"byte 0x{byte:02x} at position {error.start} of this {piece.unit} is not UTF-8."
    return _refuse(piece, record, allowed, "Convert the file: iconv -f ENCODING -t UTF-8")
