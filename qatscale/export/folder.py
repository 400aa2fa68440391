"""A Hugging Face folder: configuration, tokenizer, and weights in whatever tensors a format stores them as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qatscale.export.encoding import ExportLayout, StoredParameter
from qatscale.export.integers import packed_words
from qatscale.model.hugging_face import hugging_face_names, save_safetensors, write_config
from qatscale.model.lazy_state import LazyState


class FileTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def hf_name(layout: ExportLayout, entry: StoredParameter) -> str:
    """Hugging Face's name of a parameter, with `.weight`."""
    return hugging_face_names(layout.source.config.model)[entry.parameter.name]


def value_tensor(layout: ExportLayout, entry: StoredParameter, dtype: torch.dtype) -> FileTensor:
    return FileTensor(hf_name(layout, entry), entry.parameter.shape, dtype, lambda: layout.stored(entry))


def write_folder(
    layout: ExportLayout,
    tensors: list[FileTensor],
    folder: Path,
    tokenizer: Path | None,
    dtype: torch.dtype,
    further: Mapping[str, Any],
) -> None:
    """further: keys of config.json beyond those of a Llama. One parameter is in memory at a time."""
    config = layout.source.config
    write_config(folder, config.model, config.data.sequence_length, tokenizer, dtype, further)
    by_name = {tensor.name: tensor for tensor in tensors}
    state = LazyState({name: tensor.shape for name, tensor in by_name.items()}, lambda name: by_name[name].make())
    save_safetensors(state, folder, {name: tensor.dtype for name, tensor in by_name.items()})


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
