"""Safetensors files written one tensor at a time.

A model that is only passed on from one format to another never has to be in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Shape = tuple[int, ...]

SHARD_BYTES = 4 * 10**9
Types = torch.dtype | Mapping[str, torch.dtype]
"""One type for all tensors, or each tensor's own."""
_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.uint32: "U32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def type_of(name: str, types: Types) -> torch.dtype:
    return types if isinstance(types, torch.dtype) else types[name]


def write_safetensors(path: Path, shapes: Mapping[str, Shape], types: Types, read: Callable[[str], Tensor]) -> str:
    """Write a safetensors file of tensors `read(name)`, in the order of `shapes`, holding one at a time; it is on the
    disk when this returns. Returns its SHA-256, taken while it is written: reading a checkpoint back costs as much.

    The format (huggingface.co/docs/safetensors): the header's length as a little-endian 64-bit number, the header in
    JSON with each tensor's type, shape and [begin, end) in what follows, the tensors. Raises OSError, e.g. for a full
    disk; the file is then a piece.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        dtype = type_of(name, types)
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(content: bytes | memoryview) -> None:
            file.write(content)
            digest.update(content)

        put(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tuple(tensor.shape) == tuple(shape), f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}"
            plain = tensor.detach().to("cpu", type_of(name, types)).contiguous()
            flat = plain.as_strided((plain.numel(),), (1,))  # a single element is contiguous whatever its stride
            put(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of a tensor that holds NaN or infinity. No mask as large as the values is made."""
    extremes = ((name, torch.stack(torch.aminmax(values))) for name, values in tensors if values.numel())
    return next((name for name, pair in extremes if not pair.isfinite().all()), None)  # NaN passes through aminmax
