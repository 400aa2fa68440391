"""GGUF files by llama.cpp's own writer (the package gguf), one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from qatscale.files import sync


class TensorInfo(NamedTuple):
    """`shape` is as in PyTorch; the file has it the other way round."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    size: int
    """Bytes."""
    make: Callable[[], np.ndarray]


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
    """Metadata: text, bool, int (unsigned), float, or lists of one of them (integers in lists are signed).

    Raises OSError, e.g. for a full disk; the file is then incomplete.
    """
    writer = GGUFWriter(path, "llama")
    try:
        for key, value in metadata.items():
            kind = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for tensor in tensors:
            content = np.ascontiguousarray(tensor.make()).view(np.uint8).reshape(-1)
            assert content.size == tensor.size, f"{tensor.name}: {content.size} bytes, not {tensor.size}"
            file.write(content.data)  # write_tensor_data uses ndarray.tofile, whose OSError does not say why
            writer.write_padding(file, tensor.size)
    finally:
        writer.close()
    sync(path)
