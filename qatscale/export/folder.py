"""A Hugging Face folder: configuration, tokenizer, and weights in whatever tensors a format stores them as."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qatscale.export.encoding import ExportLayout, PlainEncoding, StoredParameter
from qatscale.export.formats.base import Format
from qatscale.export.integers import packed_words
from qatscale.model.hugging_face import hugging_face_names, save_safetensors, write_config
from qatscale.model.lazy_state import LazyState
from qatscale.untrusted import read_object


class FileTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def hf_name(layout: ExportLayout, entry: StoredParameter) -> str:
    """Hugging Face's name of a parameter, with `.weight`."""
    return hugging_face_names(layout.source.config.model)[entry.parameter.name]


class FolderFormat(Format):
    """A format that is a Hugging Face folder."""

    named_dtype: ClassVar[torch.dtype | None] = None
    """The type in config.json; None = training's."""

    @abstractmethod
    def describes(self, config: dict[str, Any]) -> bool:
        """Whether config.json is of this format."""

    def settings(self, layout: ExportLayout) -> dict[str, Any]:  # noqa: ARG002 - for formats that have some
        """Keys of config.json beyond those of the model."""
        return {}

    def tensors(self, layout: ExportLayout, entry: StoredParameter) -> list[FileTensor]:
        """Those that hold a parameter; its values themselves where it is stored as plain numbers."""
        assert isinstance(entry.encoding, PlainEncoding)
        name, dtype = hf_name(layout, entry), entry.encoding.dtype
        return [FileTensor(name, entry.parameter.shape, dtype, lambda: layout.stored(entry))]

    def write(self, layout: ExportLayout, folder: Path, tokenizer: Path | None) -> None:
        """One parameter is in memory at a time."""
        config, dtype = layout.source.config, self.named_dtype or layout.source.dtype
        write_config(folder, config.model, config.data.sequence_length, tokenizer, dtype, self.settings(layout))
        by_name = {tensor.name: tensor for entry in layout.entries for tensor in self.tensors(layout, entry)}
        state = LazyState({name: tensor.shape for name, tensor in by_name.items()}, lambda name: by_name[name].make())
        save_safetensors(state, folder, {name: tensor.dtype for name, tensor in by_name.items()})

    def find(self, path: Path) -> Path | None:
        file = path / "config.json"
        return path if file.is_file() and self.describes(read_object(file, "model")) else None


_CHUNK = 1 << 22
"""Integers that are spread into bits at a time; each bit then takes a byte."""


def pack(values: Tensor, bits: int) -> Tensor:
    """values: [rows, n] of any integer type, of which the lowest `bits` bits count -> int32 [rows, words].

    Integer i takes the bits from i·bits on, the lowest first, and may cross two words. The rest of a row's last word is
    0. compressed-tensors' pack-quantized and MLX's affine weights are both this stream of bits.
    """
    rows, count = values.shape
    out = torch.empty(rows, packed_words(count, bits), dtype=torch.int32)
    step = max(1, _CHUNK // count)
    for first in range(0, rows, step):
        part = values[first : first + step].to(torch.uint8).numpy()
        spread = np.unpackbits(part[..., None], axis=-1, count=bits, bitorder="little").reshape(len(part), -1)
        spread = np.pad(spread, ((0, 0), (0, 32 * out.shape[1] - spread.shape[1])))
        packed = np.packbits(spread, axis=-1, bitorder="little").view("<i4")
        out[first : first + step] = torch.from_numpy(packed.astype(np.int32, copy=False))
    return out
