"""Tensors read when they are asked for, and safetensors files written one tensor at a time.

A model that is only passed on from one format to another never has to be in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""Parameter name → value, as from `named_parameters()` or `state_dict()`."""
Shape = tuple[int, ...]

SHARD_BYTES = 4 * 10**9
Types = torch.dtype | Mapping[str, torch.dtype]
"""One type for all tensors, or each tensor's own."""
_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.uint32: "U32",
}  # fmt: skip


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are read each time they are asked for; their shapes are known."""

    def __init__(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> None:
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(state: State) -> dict[str, Shape]:
    """Without reading any tensor."""
    return state.shapes if isinstance(state, LazyState) else {name: tuple(t.shape) for name, t in state.items()}


def renamed(state: State, names: Mapping[str, str]) -> State:
    """New name → the tensor of the old name; the very same tensors, or as lazy as `state` is."""
    if isinstance(state, LazyState):
        return LazyState({new: state.shapes[old] for new, old in names.items()}, lambda new: state[names[new]])
    return {new: state[old] for new, old in names.items()}


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
