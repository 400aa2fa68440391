"""`compressed-tensors`, format pack-quantized: integers in b bits and a scale per row or group, symmetric.

A Linear of name N is stored as N.weight_packed (int32, see `packing`; each integer raised by 2^(b-1)), N.weight_scale
([rows, groups], in the type of training) and N.weight_shape. transformers reads it with the package
compressed-tensors. vLLM reads it too. It asks for these names and for symmetric scales without zero points. The layers
that it fuses (q, k, v and gate, up) must share a scheme.

In two's complement ±1 takes 2 bits a weight, and SEQ's ±1 and ±3 take 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qatscale.export.clients import Transformers
from qatscale.export.encoding import Encoding, ExportLayout, PlainEncoding, StoredParameter
from qatscale.export.folder import FileTensor, FolderFormat, hf_name, pack
from qatscale.export.formats.base import Usage, transformers_usage
from qatscale.export.integers import packed_words, signed_bits
from qatscale.export.quantized_matrix import QuantizedMatrix
from qatscale.export.source import SourceParameter

_VLLM = (
    "vLLM reads the same layout (`vllm serve .`, on a GPU; weights of 2 to 8 bits in its releases of 2026, 4 and 8 "
    "before). It was not run here."
)


class CompressedTensors(Transformers):
    packages = Transformers.packages | {"compressed-tensors": "compressed_tensors"}


@dataclass(frozen=True)
class PackedEncoding(Encoding):
    bits: int
    dtype: torch.dtype
    """Type of scales, and of the weights that clients compute from them."""

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def refusal(self, parameter: SourceParameter) -> str | None:
        if parameter.is_table:
            return "clients unpack Linear layers, not an embedding, which is also the head of a tied model."
        return None

    def size(self, parameter: SourceParameter) -> int:
        rows, columns = parameter.shape
        shape_bytes = 2 * torch.int64.itemsize
        return 4 * rows * packed_words(columns, self.bits) + parameter.scales * self.dtype.itemsize + shape_bytes

    def stored_scale(self, scale: Tensor) -> Tensor:
        return scale.to(self.dtype).float()

    def read(self, matrix: QuantizedMatrix) -> Tensor:
        return matrix.values(self.dtype)


class CompressedTensorsFormat(FolderFormat):
    name = "compressed-tensors"
    clients = (CompressedTensors,)

    def encodings(self, parameter: SourceParameter, dtype: torch.dtype) -> list[Encoding]:
        plain = PlainEncoding(dtype)
        if parameter.quantizer is None:
            return [plain]
        return [PackedEncoding(signed_bits(parameter.quantizer), dtype), plain]

    def describes(self, config: dict[str, Any]) -> bool:
        quantization = config.get("quantization_config")
        return isinstance(quantization, dict) and quantization.get("quant_method") == self.name

    def settings(self, layout: ExportLayout) -> dict[str, Any]:
        return {"quantization_config": quantization_config(layout)}

    def tensors(self, layout: ExportLayout, entry: StoredParameter) -> list[FileTensor]:
        encoding, parameter = entry.encoding, entry.parameter
        if not isinstance(encoding, PackedEncoding):
            return super().tensors(layout, entry)
        (rows, columns), base, bits = parameter.shape, hf_name(layout, entry), encoding.bits

        def packed() -> Tensor:
            return pack(layout.matrix(entry).integers.to(torch.int16) + 2 ** (bits - 1), bits)

        return [
            FileTensor(f"{base}_packed", (rows, packed_words(columns, bits)), torch.int32, packed),
            FileTensor(f"{base}_scale", (rows, parameter.groups), encoding.dtype, lambda: layout.matrix(entry).scale),
            FileTensor(f"{base}_shape", (2,), torch.int64, lambda: torch.tensor(parameter.shape)),
        ]

    def usages(self, has_tokenizer: bool, file: str) -> list[Usage]:  # noqa: ARG002
        return [transformers_usage(CompressedTensors, has_tokenizer, note=_VLLM)]


def quantization_config(layout: ExportLayout) -> dict[str, Any]:
    """The entry of config.json. Layers of one scheme are named by regular expressions over their last parts."""
    packed: dict[tuple[int, int | None], set[str]] = {}
    dense = set()
    for entry in layout.entries:
        name = hf_name(layout, entry).removesuffix(".weight")
        if isinstance(entry.encoding, PackedEncoding):
            group = entry.parameter.group_size if entry.parameter.groups > 1 else None
            packed.setdefault((entry.encoding.bits, group), set()).add(name.rsplit(".", 1)[-1])
        elif not entry.parameter.is_vector:
            dense.add(name)
    if layout.source.config.model.tied_embedding:
        dense.add("lm_head")
    groups = {
        f"group_{index}": {
            "targets": [f"re:.*{re.escape(last)}$" for last in sorted(names)],
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
                "strategy": "group" if group else "channel", "group_size": group,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for index, ((bits, group), names) in enumerate(packed.items())
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": sorted(dense), "kv_cache_scheme": None,
    }  # fmt: skip


FORMAT = CompressedTensorsFormat()
