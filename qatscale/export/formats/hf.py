"""`hf`: weights on their grid, in the type of training's forward pass. Any program that reads Llama reads it."""

from __future__ import annotations

from pathlib import Path

import torch

from qatscale.export.clients import Transformers
from qatscale.export.encoding import ExportLayout, PlainEncoding
from qatscale.export.folder import value_tensor, write_folder
from qatscale.export.formats.base import Format, Usage, read_config, transformers_usage
from qatscale.export.source import SourceParameter


class HuggingFace(Format):
    name = "hf"
    holds_full_precision = True
    clients = (Transformers,)

    def encodings(self, parameter: SourceParameter, dtype: torch.dtype) -> list[PlainEncoding]:  # noqa: ARG002
        return [PlainEncoding(dtype)]

    def write(self, layout: ExportLayout, folder: Path, tokenizer: Path | None) -> None:
        dtype = layout.source.dtype
        tensors = [value_tensor(layout, entry, dtype) for entry in layout.entries]
        write_folder(layout, tensors, folder, tokenizer, dtype, {})

    def find(self, path: Path) -> Path | None:
        return path if read_config(path) is not None else None

    def usages(self, has_tokenizer: bool, file: str) -> list[Usage]:  # noqa: ARG002
        return [transformers_usage(Transformers, has_tokenizer)]


FORMAT = HuggingFace()
