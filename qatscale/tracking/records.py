"""Records, one JSON object per line. Lines stay complete after any kill, and a file can be read while it grows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from qatlaw.files import LARGEST, naming
from qatscale.errors import UserError, first_invalid
from qatscale.files import Count, decode, encode

Record = dict[str, Any]


_STEP: dict[str, Any] = {"event": str, "time": float, "step": Count}
_FIELDS: dict[str, dict[str, Any]] = {
    "metrics": {"phase": str, "loss": float}, "validation": {"view": str, "loss": float},
    "switch": {"report": dict}, "spike": {"norm": float}, "final": {"metrics": dict}, "resume": {}, "checkpoint": {},
}  # fmt: skip
"""What readers rely on, by event. Any record may have more."""
_OPTIONAL: dict[str, Any] = {"tokens": (Count, 0), "steps": (Count, 0), "tokens_per_second": (float, 0.0)}
_SCHEMAS: dict[str, Any] = {
    event: create_model(event, **{name: (kind, ...) for name, kind in (_STEP | fields).items()} | _OPTIONAL)
    for event, fields in _FIELDS.items()
}
_ANY = create_model("any", event=(str, ...), step=(Count, 0))


class Appender:
    """Appends records. Each reaches the kernel before `append` returns, so a SIGKILL loses none of them."""

    def __init__(self, path: Path) -> None:
        repair(path)
        self._file = path.open("ab", buffering=0)

    def append(self, record: Record) -> None:
        line = memoryview(json.dumps(encode(record), allow_nan=False).encode() + b"\n")
        with naming(Path(self._file.name)):
            while line:  # a raw write may be short
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def repair(path: Path) -> None:
    """Complete the last line of a file: if it lacks its newline, add one to valid JSON, and cut off anything else."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start, tail = size, b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - 65536)
            file.seek(start)
            tail = file.read(size - start)
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        try:
            json.loads(torn)
        except ValueError:
            file.truncate(size - len(torn))
        else:
            file.write(b"\n")


class Tail:
    """Reads records from a byte offset on. A last line without its newline waits for the next call."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def read(self, limit: int = 1 << 22) -> list[Record]:
        """The complete records of about the next `limit` bytes; empty at the end of the file.

        UserError, naming file, offset and field, for a line that is not a record.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(limit)
                while data and b"\n" not in data and (more := file.read(limit)):
                    data += more
                    if len(data) > LARGEST:
                        raise self._damage("is longer than any record")
        except FileNotFoundError:
            return []
        records = []
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                record = decode(json.loads(line))
                event = record.get("event") if isinstance(record, dict) else None
                _SCHEMAS.get(str(event), _ANY).model_validate(record, strict=True)
            except ValidationError as error:
                raise self._damage(f"is damaged: {first_invalid(error)}") from None
            except (ValueError, RecursionError) as error:
                raise self._damage(f"is not JSON ({error})") from None
            records.append(record)
            self.offset += len(line)
        return records

    def _damage(self, problem: str) -> UserError:
        fix = "Restore the file, or remove the line."
        return UserError("run", str(self.path), f"the line at byte {self.offset} {problem}.", fix)

    def __iter__(self) -> Iterator[Record]:
        while records := self.read():
            yield from records


def live(records: Iterable[Record]) -> list[Record]:
    """The records that no later `resume` superseded.

    A resume at step k takes the run back to k, and supersedes earlier records with step > k. A checkpoint at the switch
    step precedes the switch, so a resume there switches again and supersedes a `switch` at step k too. A run that ended
    between its final evaluation and its marker evaluates again: of equal step and view the last `validation` counts.
    """
    kept: list[Record] = []
    evaluated: set[tuple[Any, Any]] = set()
    for record in records:
        if record["event"] == "resume":
            k = record["step"]
            kept = [old for old in kept if old.get("step", 0) < k + (old["event"] != "switch")]
        elif record["event"] == "validation":
            if (view := _view(record)) in evaluated:
                kept = [old for old in kept if old["event"] != "validation" or _view(old) != view]
            evaluated.add(view)
        kept.append(record)
    return kept


def _view(record: Record) -> tuple[Any, Any]:
    return record.get("step"), record.get("view")
