"""A Hugging Face folder: configuration, tokenizer, and weights in whatever tensors a format stores them as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatscale.export.encoding import Entry, Plan
from qatscale.model.hugging_face import hugging_face_names, save_safetensors, write_config
from qatscale.tensor_files import LazyState


class Part(NamedTuple):
    """One tensor in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def hf_name(plan: Plan, entry: Entry) -> str:
    """Of a parameter, with `.weight`."""
    return hugging_face_names(plan.source.config.model)[entry.parameter.name]


def value_part(plan: Plan, entry: Entry, dtype: torch.dtype) -> Part:
    """The parameter's values under its usual name."""
    return Part(hf_name(plan, entry), entry.parameter.shape, dtype, lambda: plan.stored(entry))


def write_folder(
    plan: Plan, parts: list[Part], folder: Path, tokenizer: Path | None, dtype: torch.dtype, further: Mapping[str, Any]
) -> None:
    """further: keys of config.json beyond those of a Llama. One parameter is in memory at a time."""
    config = plan.source.config
    write_config(folder, config.model, config.data.sequence_length, tokenizer, dtype, further)
    by_name = {part.name: part for part in parts}
    state = LazyState({name: part.shape for name, part in by_name.items()}, lambda name: by_name[name].make())
    save_safetensors(state, folder, {name: part.dtype for name, part in by_name.items()})
