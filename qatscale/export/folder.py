"""A Hugging Face folder: configuration, tokenizer, and weights in whatever tensors a format stores them as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatscale.export.encoding import ExportLayout, StoredParameter
from qatscale.model.hugging_face import hugging_face_names, save_safetensors, write_config
from qatscale.tensor_files import LazyState


class FileTensor(NamedTuple):
    """One tensor in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def hf_name(layout: ExportLayout, entry: StoredParameter) -> str:
    """Hugging Face's name of a parameter, with `.weight`."""
    return hugging_face_names(layout.source.config.model)[entry.parameter.name]


def value_tensor(layout: ExportLayout, entry: StoredParameter, dtype: torch.dtype) -> FileTensor:
    """The parameter's values under its usual name."""
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
