"""The GGUF file format, version 3 (docs/gguf.md of github.com/ggml-org/ggml): metadata, list of tensors, tensors."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ALIGNMENT = 32
F32, F16, BF16 = 0, 1, 30
"""ggml_type of plain numbers."""
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class TensorInfo(NamedTuple):
    """`shape` is as in PyTorch; the file has it the other way round."""

    name: str
    shape: tuple[int, ...]
    kind: int
    size: int
    """Bytes."""
    make: Callable[[], np.ndarray]


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
    """One tensor is in memory at a time. Metadata: text, bool, int (unsigned), float, or lists of one of them.

    Raises OSError, e.g. for a full disk; the file is then a piece.
    """
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        dims = tuple(reversed(tensor.shape))
        head.append(_string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind, offset))
        offset += _padded(tensor.size)
    with path.open("wb") as file:
        _write_padded(file, b"".join(head))
        for tensor in tensors:
            content = np.ascontiguousarray(tensor.make()).view(np.uint8).reshape(-1)
            assert content.size == tensor.size, f"{tensor.name}: {content.size} bytes, not {tensor.size}"
            _write_padded(file, content.data)
        file.flush()
        os.fsync(file.fileno())


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write_padded(file: Any, content: Any) -> None:
    file.write(content)
    file.write(bytes(_padded(len(content)) - len(content)))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0])
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_plain(item, kind) for item in value)
    return struct.pack("<I", _kind(value)) + _plain(value, _kind(value))


def _kind(value: Any) -> int:
    return {bool: _BOOL, str: _STRING, float: _F32, int: _U32, np.int32: _I32}[type(value)]


def _plain(value: Any, kind: int) -> bytes:
    if kind == _STRING:
        return _string(value)
    return struct.pack({_BOOL: "<?", _F32: "<f", _U32: "<I", _I32: "<i"}[kind], value)
