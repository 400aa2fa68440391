"""`hf`: weights on their grid, in the type of training's forward pass. Any program that reads Llama reads it."""

from __future__ import annotations

from pathlib import Path

from qatscale.export.encoding import Plain, Plan, choose
from qatscale.export.folder import value_part, write_folder
from qatscale.export.source import Source

NAME = "hf"


def plan(source: Source, fallback: bool) -> Plan:
    return choose(source, NAME, {p.name: [Plain(source.dtype)] for p in source.parameters}, fallback)


def write(plan: Plan, folder: Path, tokenizer: Path | None) -> None:
    dtype = plan.source.dtype
    write_folder(plan, [value_part(plan, entry, dtype) for entry in plan.entries], folder, tokenizer, dtype, {})
