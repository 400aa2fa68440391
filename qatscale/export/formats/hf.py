"""`hf`: weights on their grid, in the type of training's forward pass. Any program that reads Llama reads it."""

from __future__ import annotations

from typing import Any

import torch

from qatscale.export.clients import Transformers
from qatscale.export.encoding import PlainEncoding
from qatscale.export.folder import FolderFormat
from qatscale.export.formats.base import Usage, transformers_usage
from qatscale.export.source import SourceParameter


class HuggingFace(FolderFormat):
    name = "hf"
    holds_full_precision = True
    clients = (Transformers,)

    def encodings(self, parameter: SourceParameter, dtype: torch.dtype) -> list[PlainEncoding]:  # noqa: ARG002
        return [PlainEncoding(dtype)]

    def describes(self, config: dict[str, Any]) -> bool:  # noqa: ARG002 - it is of any model
        return True

    def usages(self, has_tokenizer: bool, file: str) -> list[Usage]:  # noqa: ARG002
        return [transformers_usage(Transformers, has_tokenizer)]


FORMAT = HuggingFace()
