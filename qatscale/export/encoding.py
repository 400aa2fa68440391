"""How a format stores one parameter, and which parameters of a model it stores how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qatscale.errors import UserError
from qatscale.export.grid import Grid
from qatscale.export.source import Parameter, Source


class Encoding(ABC):
    """A way to store a quantized matrix, or any parameter as plain numbers."""

    name: str

    @abstractmethod
    def refusal(self, parameter: Parameter) -> str | None:
        """Why it cannot hold the parameter to the bit; None = it can."""

    @abstractmethod
    def size(self, parameter: Parameter) -> int:
        """Bytes in the file, scales and padding included."""

    def store_unit(self, unit: Tensor) -> Tensor:
        """The unit of a `Grid`, fp32, as it is after being stored."""
        return unit

    def read(self, grid: Grid) -> Tensor:
        """What the format's client makes of the stored codes and units, in its type."""
        return grid.values()

    tolerance: float = 0.0
    """Relative to a row's largest weight, how far a client's weights may be from `read`: its order of operations."""


@dataclass(frozen=True)
class Plain(Encoding):
    """The values themselves; of a quantized matrix, those on its grid."""

    dtype: torch.dtype

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.dtype).removeprefix("torch.")

    def refusal(self, parameter: Parameter) -> str | None:  # noqa: ARG002 - it holds any
        return None

    def size(self, parameter: Parameter) -> int:
        return parameter.numel * self.dtype.itemsize

    def read(self, grid: Grid) -> Tensor:
        return grid.values(self.dtype)


@dataclass(frozen=True)
class Entry:
    """One parameter in the file."""

    parameter: Parameter
    encoding: Encoding
    fallback: str | None = None
    """Why the encoding is not the format's first choice."""


@dataclass
class Plan:
    """What is exported and how. Reads the checkpoint as it is asked for it."""

    source: Source
    entries: list[Entry]
    rounding: dict[str, float] = field(default_factory=dict)
    """Parameter -> largest relative change of its scales by being stored; filled while they are."""

    def grid(self, entry: Entry) -> Grid:
        """Codes, and units as the encoding stores them. UserError where a unit has no place in its type."""
        grid = self.source.grid(entry.parameter)
        stored = entry.encoding.store_unit(grid.unit)
        if not (torch.isfinite(stored).all() and (stored > 0).all()):
            worst = grid.unit.max() if not torch.isfinite(stored).all() else grid.unit.min()
            allowed = f"{entry.encoding.name} has no scale of {float(worst):.3g}, which {entry.parameter} needs."
            raise UserError("--format", None, allowed, "Choose hf.")
        change = float(((stored - grid.unit).abs() / grid.unit).max())
        self.rounding[entry.parameter.name] = change
        return grid.with_unit(stored)

    def stored(self, entry: Entry) -> Tensor:
        """What a client reads: the weights as the file has them, [shape of the parameter]."""
        if entry.parameter.quantizer is None:
            assert isinstance(entry.encoding, Plain)
            return self.source.plain(entry.parameter).to(entry.encoding.dtype)
        return entry.encoding.read(self.grid(entry))

    @property
    def rounded(self) -> float:
        """Largest relative change of a scale by being stored; of what has been written or read so far."""
        return max(self.rounding.values(), default=0.0)


def choose(source: Source, format: str, choices: Mapping[str, Sequence[Encoding]], fallback: bool) -> Plan:
    """The plan where each parameter gets the first of its `choices` (by name, best first) that holds it.

    UserError for a parameter whose first choice cannot hold it, unless `fallback` allows the next.
    """
    entries, refused = [], []
    for parameter in source.parameters:
        first, *others = choices[parameter.name]
        reason = first.refusal(parameter)
        if reason is None:
            entries.append(Entry(parameter, first))
            continue
        refused.append((parameter, reason))
        other = next(encoding for encoding in others if encoding.refusal(parameter) is None)
        entries.append(Entry(parameter, other, reason))
    if refused and not fallback:
        parameter, reason = refused[0]
        more = f" And {len(refused) - 1} more like it." if len(refused) > 1 else ""
        cost = sum(fallback_cost(entry, source.dtype) for entry in entries)
        do = f"Add --fallback to store such tensors in the next type that holds them exactly, {cost / 2**20:.2f} MiB"
        raise UserError("--format", format, f"cannot hold {parameter}: {reason}{more}", f"{do} more; or choose hf.")
    return Plan(source, entries)


def fallback_cost(entry: Entry, dtype: torch.dtype) -> float:
    """Bytes beyond the ideal of an entry that is not in its first choice; 0 for the others."""
    return entry.encoding.size(entry.parameter) - ideal_size(entry.parameter, dtype) if entry.fallback else 0.0


def ideal_size(parameter: Parameter, dtype: torch.dtype) -> float:
    """N·B/8 + the scales, in training's type; an unquantized parameter in training's type."""
    if parameter.quantizer is None:
        return parameter.numel * dtype.itemsize
    return parameter.numel * parameter.quantizer.bits / 8 + parameter.scales * dtype.itemsize
