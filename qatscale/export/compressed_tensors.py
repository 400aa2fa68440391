"""`compressed-tensors`, format pack-quantized: integers in b bits and a scale per row or group, symmetric.

A Linear of name N is stored as N.weight_packed (int32, see `packing`; each integer raised by 2^(b-1)), N.weight_scale
([rows, groups], in the type of training) and N.weight_shape. Read by transformers with the package compressed-tensors,
and by vLLM, which asks for just these names, for symmetric scales without zero points, and for the same scheme in what
it fuses (q, k, v and gate, up: they have one width here).

1 bit takes two (±1 is no two's complement number of one bit), SEQ's 2 bits take three (±1, ±3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatscale.export.encoding import Encoding, Entry, Plain, Plan, choose
from qatscale.export.folder import Part, hf_name, value_part, write_folder
from qatscale.export.grid import Grid, signed_bits
from qatscale.export.packing import pack, words
from qatscale.export.source import Parameter, Source

NAME = "compressed-tensors"


@dataclass(frozen=True)
class PackedIntegers(Encoding):
    bits: int
    dtype: torch.dtype
    """Of scales, and of the weights that clients make of them."""
    tied: bool

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int{self.bits}"

    def refusal(self, parameter: Parameter) -> str | None:
        if parameter.is_table:
            what = "an embedding" if not self.tied else "an embedding that is the head too"
            return f"clients unpack Linear layers, not {what}."
        return None

    def size(self, parameter: Parameter) -> int:
        rows = parameter.shape[0]
        shape_bytes = 2 * torch.int64.itemsize
        return 4 * rows * words(parameter.shape[1], self.bits) + parameter.scales * self.dtype.itemsize + shape_bytes

    def store_unit(self, unit: Tensor) -> Tensor:
        return unit.to(self.dtype).float()

    def read(self, grid: Grid) -> Tensor:
        return grid.values(self.dtype)


def plan(source: Source, fallback: bool) -> Plan:
    tied = source.config.model.tied_embedding
    plain = Plain(source.dtype)
    choices: dict[str, list[Encoding]] = {
        p.name: [PackedIntegers(signed_bits(p.quantizer), source.dtype, tied), plain] if p.quantizer else [plain]
        for p in source.parameters
    }
    return choose(source, NAME, choices, fallback)


def write(plan: Plan, folder: Path, tokenizer: Path | None) -> None:
    parts = [part for entry in plan.entries for part in _parts(plan, entry)]
    further = {"quantization_config": quantization_config(plan)}
    write_folder(plan, parts, folder, tokenizer, plan.source.dtype, further)


def _parts(plan: Plan, entry: Entry) -> list[Part]:
    encoding, parameter = entry.encoding, entry.parameter
    if not isinstance(encoding, PackedIntegers):
        return [value_part(plan, entry, plan.source.dtype)]
    (rows, channels), base, bits = parameter.shape, hf_name(plan, entry), encoding.bits

    def packed() -> Tensor:
        return pack(plan.grid(entry).integers.to(torch.int16) + 2 ** (bits - 1), bits)

    return [
        Part(f"{base}_packed", (rows, words(channels, bits)), torch.int32, packed),
        Part(f"{base}_scale", (rows, parameter.groups), encoding.dtype, lambda: plan.grid(entry).unit),
        Part(f"{base}_shape", (2,), torch.int64, lambda: torch.tensor(parameter.shape)),
    ]


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The entry of config.json. Layers of one scheme are named by regular expressions over their last parts."""
    packed: dict[tuple[int, int | None], set[str]] = {}
    dense = set()
    for entry in plan.entries:
        name = hf_name(plan, entry).removesuffix(".weight")
        if isinstance(entry.encoding, PackedIntegers):
            group = entry.parameter.group if entry.parameter.groups > 1 else None
            packed.setdefault((entry.encoding.bits, group), set()).add(name.rsplit(".", 1)[-1])
        elif not entry.parameter.is_norm:
            dense.add(name)
    if plan.source.config.model.tied_embedding:
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
