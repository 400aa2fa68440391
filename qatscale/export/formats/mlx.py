"""`mlx`: a folder for mlx-lm. Codes in b bits, and for every 128, 64 or 32 of them a scale s and a bias b: w = s·q + b.

A grid's lowest level is `lowest · scale`, so b = lowest · scale and s = step · scale: s = 2α, b = -α for 1 bit,
α/2 and -3α/4 for 2, α and -2^(B-1)·α from 3 on. Scales are written in fp32, because MLX computes s·q + b in
their type, and it has more digits than bf16 or fp16 holds (63·α in 6 bits).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatscale.export.clients import Client, Weights, install_line
from qatscale.export.encoding import Encoding, ExportLayout, PlainEncoding, StoredParameter
from qatscale.export.folder import FileTensor, FolderFormat, hf_name, pack
from qatscale.export.formats.base import Usage
from qatscale.export.integers import MLX_GROUPS, integer_range, integer_step, mlx_bits, packed_words
from qatscale.export.quantized_matrix import QuantizedMatrix
from qatscale.export.source import SourceParameter

_CODE = """\
from mlx_lm import generate, load

model, tokenizer = load(".")
ids = tokenizer.encode("The", add_special_tokens=False)
print(generate(model, tokenizer, prompt=ids, max_tokens=20))
"""
_CODE_IDS = """\
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

model, _ = load_model(Path("."))
print(model(mx.array([[1, 2, 3]]))[0, -1].argmax())
"""


class MlxLm(Client):
    name = "mlx-lm"
    packages = {"mlx[cpu]": "mlx", "mlx-lm": "mlx_lm"}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        from mlx_lm.utils import load_model

        self._model, _ = load_model(path)

    def weights(self) -> Weights:
        import mlx.core as mx

        for name, module in self._model.named_modules():
            if "weight" not in module:
                continue
            weight = module.weight
            if "scales" in module:
                settings = {"group_size": module.group_size, "bits": module.bits}
                weight = mx.dequantize(weight, module.scales, module.biases, **settings)
            yield f"{name}.weight", torch.from_numpy(np.array(weight.astype(mx.float32)))
            if "bias" in module:
                yield f"{name}.bias", torch.from_numpy(np.array(module.bias.astype(mx.float32)))

    def logits(self, tokens: Tensor) -> Tensor:
        import mlx.core as mx

        logits = self._model(mx.array(tokens.numpy())[None])[0].astype(mx.float32)
        return torch.from_numpy(np.array(logits))


@dataclass(frozen=True)
class AffineEncoding(Encoding):
    bits: int
    group_size: int
    tolerance = 2.0**-20
    """s·q and the sum are each rounded once, at the size of the row's largest level and a half more."""

    @property
    def name(self) -> str:
        return f"affine{self.bits}/{self.group_size}"

    def refusal(self, parameter: SourceParameter) -> str | None:
        for what, columns in (("rows", parameter.shape[1]), ("groups of scales", parameter.group_size)):
            if columns % self.group_size:
                return f"{what} of {columns} channels do not divide into groups of {self.group_size}."
        return None

    def size(self, parameter: SourceParameter) -> int:
        rows, columns = parameter.shape
        return 4 * rows * packed_words(columns, self.bits) + 2 * 4 * rows * (columns // self.group_size)

    def read(self, matrix: QuantizedMatrix) -> Tensor:
        scales, biases = self.scales(matrix)
        codes = matrix.unsigned.view(torch.uint8).float().unflatten(1, (-1, self.group_size))
        return (codes * scales.unsqueeze(-1) + biases.unsqueeze(-1)).flatten(1)

    def scales(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        """(s, b), each fp32 [rows, columns / group_size]."""
        columns = matrix.codes.shape[1]
        scale = matrix.scale.repeat_interleave(columns // self.group_size // matrix.scale.shape[1], dim=1)
        return integer_step(matrix.quantizer) * scale, integer_range(matrix.quantizer)[0] * scale


class Mlx(FolderFormat):
    name = library = "mlx"
    named_dtype = torch.float32
    clients = (MlxLm,)

    def encodings(self, parameter: SourceParameter, dtype: torch.dtype) -> list[Encoding]:
        if parameter.quantizer is None:
            # the activations' type follows the norms': fp32, as the quantized layers compute
            return [PlainEncoding(torch.float32 if parameter.is_vector else dtype)]
        affine = [AffineEncoding(mlx_bits(parameter.quantizer), size) for size in MLX_GROUPS]
        # groups are all the same to the arithmetic: the largest that fits is the first choice, not a fallback
        affine.sort(key=lambda encoding: encoding.refusal(parameter) is not None)
        return [*affine, PlainEncoding(dtype)]

    def describes(self, config: dict[str, Any]) -> bool:
        """mlx-lm's key; it may repeat it as quantization_config for transformers."""
        return "quantization" in config

    def settings(self, layout: ExportLayout) -> dict[str, Any]:
        quantization = quantization_config(layout)
        return {"quantization": quantization, "quantization_config": quantization} if quantization else {}

    def tensors(self, layout: ExportLayout, entry: StoredParameter) -> list[FileTensor]:
        encoding, parameter = entry.encoding, entry.parameter
        if not isinstance(encoding, AffineEncoding):
            return super().tensors(layout, entry)
        (rows, columns), base = parameter.shape, hf_name(layout, entry).removesuffix(".weight")
        packed, grouped = (rows, packed_words(columns, encoding.bits)), (rows, columns // encoding.group_size)

        def words() -> Tensor:
            return pack(layout.matrix(entry).unsigned, encoding.bits).view(torch.uint32)

        return [
            FileTensor(f"{base}.weight", packed, torch.uint32, words),
            FileTensor(f"{base}.scales", grouped, torch.float32, lambda: encoding.scales(layout.matrix(entry))[0]),
            FileTensor(f"{base}.biases", grouped, torch.float32, lambda: encoding.scales(layout.matrix(entry))[1]),
        ]

    def usages(self, has_tokenizer: bool, file: str) -> list[Usage]:  # noqa: ARG002
        return [Usage(install=install_line(MlxLm.packages), code=_CODE if has_tokenizer else _CODE_IDS)]


def quantization_config(layout: ExportLayout) -> dict[str, Any] | None:
    """mlx-lm's entry: the commonest setting, and that of every other layer by name; None without quantized layers."""
    layers = {
        hf_name(layout, entry).removesuffix(".weight"): entry.encoding
        for entry in layout.entries
        if isinstance(entry.encoding, AffineEncoding)
    }
    if not layers:
        return None
    counts = Counter(layers.values())
    common = max(counts, key=lambda encoding: (counts[encoding], encoding.bits))
    others = {name: {"group_size": e.group_size, "bits": e.bits} for name, e in layers.items() if e != common}
    return {"group_size": common.group_size, "bits": common.bits, "mode": "affine", **others}


FORMAT = Mlx()
