"""`mlx`: a folder for mlx-lm. Codes in b bits, and for every 128, 64 or 32 of them a scale s and a bias b: w = s·q + b.

The lowest level of a grid is `lowest · unit`, so b = lowest · unit and s = step · unit: s = 2α, b = -α for 1 bit,
α/2 and -3α/4 for 2, α and -2^(B-1)·α from 3 on. Scales are written in fp32: s·q + b has more digits than bf16 or fp16
holds (63·α in 6 bits), and MLX computes it in the scales' type.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatscale.export.encoding import Encoding, Entry, Plain, Plan, choose
from qatscale.export.folder import Part, hf_name, value_part, write_folder
from qatscale.export.grid import Grid, integer_step, lowest_integer
from qatscale.export.packing import pack, words
from qatscale.export.source import Parameter, Source

NAME = "mlx"
GROUPS = (128, 64, 32)
"""Codes that share a scale in MLX, the cheapest first."""


@dataclass(frozen=True)
class Affine(Encoding):
    bits: int
    group: int
    tolerance = 2.0**-20
    """s·q and the sum are each rounded once, at the size of the row's largest level and a half more."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"affine{self.bits}/{self.group}"

    def refusal(self, parameter: Parameter) -> str | None:
        for what, width in (("rows", parameter.shape[1]), ("groups of scales", parameter.group)):
            if width % self.group:
                return f"{what} of {width} channels do not divide into groups of {self.group}."
        return None

    def size(self, parameter: Parameter) -> int:
        rows, channels = parameter.shape
        return 4 * rows * words(channels, self.bits) + 2 * 4 * rows * (channels // self.group)

    def read(self, grid: Grid) -> Tensor:
        scales, biases = self.scales(grid)
        codes = grid.unsigned.view(torch.uint8).float().unflatten(1, (-1, self.group))
        return (codes * scales.unsqueeze(-1) + biases.unsqueeze(-1)).flatten(1)

    def scales(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """(s, b), each fp32 [rows, in / group]."""
        channels = grid.codes.shape[1]
        unit = grid.unit.repeat_interleave(channels // self.group // grid.unit.shape[1], dim=1)
        return integer_step(grid.quantizer) * unit, lowest_integer(grid.quantizer) * unit


def plan(source: Source, fallback: bool) -> Plan:
    choices = {parameter.name: _choices(parameter, source.dtype) for parameter in source.parameters}
    return choose(source, NAME, choices, fallback)


def _choices(parameter: Parameter, dtype: torch.dtype) -> list[Encoding]:
    if parameter.quantizer is None:
        # the activations' type follows the norms': fp32, as the quantized layers compute
        return [Plain(torch.float32 if parameter.is_norm else dtype)]
    affine = [Affine(parameter.quantizer.storage_bits, group) for group in GROUPS]
    # groups are all the same to the arithmetic: the largest that fits is the first choice, not a fallback
    return [*sorted(affine, key=lambda encoding: encoding.refusal(parameter) is not None), Plain(dtype)]


def write(plan: Plan, folder: Path, tokenizer: Path | None) -> None:
    parts = [part for entry in plan.entries for part in _parts(plan, entry)]
    quantization = quantization_config(plan)
    further = {"quantization": quantization, "quantization_config": quantization} if quantization else {}
    write_folder(plan, parts, folder, tokenizer, torch.float32, further)


def _parts(plan: Plan, entry: Entry) -> list[Part]:
    encoding, parameter = entry.encoding, entry.parameter
    if not isinstance(encoding, Affine):
        assert isinstance(encoding, Plain)
        return [value_part(plan, entry, encoding.dtype)]
    (rows, channels), base = parameter.shape, hf_name(plan, entry).removesuffix(".weight")
    packed = (rows, words(channels, encoding.bits))
    grouped = (rows, channels // encoding.group)
    return [
        Part(f"{base}.weight", packed, torch.uint32, lambda: _uint32(pack(plan.grid(entry).unsigned, encoding.bits))),
        Part(f"{base}.scales", grouped, torch.float32, lambda: encoding.scales(plan.grid(entry))[0]),
        Part(f"{base}.biases", grouped, torch.float32, lambda: encoding.scales(plan.grid(entry))[1]),
    ]


def _uint32(words: Tensor) -> Tensor:
    return words.view(torch.uint32)


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """mlx-lm's: the commonest setting for all layers, and every quantized layer's own by name; None without any."""
    layers = {
        hf_name(plan, entry).removesuffix(".weight"): entry.encoding
        for entry in plan.entries
        if isinstance(entry.encoding, Affine)
    }
    if not layers:
        return None
    common = max(set(layers.values()), key=lambda e: (list(layers.values()).count(e), e.bits))
    settings = {name: {"group_size": e.group, "bits": e.bits} for name, e in layers.items() if e != common}
    return {"group_size": common.group, "bits": common.bits, "mode": "affine", **settings}
