"""How one parameter is stored, and the layout of an export: every parameter with its encoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qatscale.errors import UserError
from qatscale.export.quantized_matrix import QuantizedMatrix
from qatscale.export.source import ExportSource, SourceParameter


class Encoding(ABC):
    """A way to store a quantized matrix, or any parameter as plain numbers."""

    tolerance: float = 0.0
    """Largest distance of a client's weights from `read`, relative to a row's largest; it rounds in another order."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def refusal(self, parameter: SourceParameter) -> str | None:
        """Why it cannot hold the parameter exactly; None = it can."""

    @abstractmethod
    def size(self, parameter: SourceParameter) -> int:
        """Bytes in the file, scales and padding included."""

    def stored_scale(self, scale: Tensor) -> Tensor:
        """A `QuantizedMatrix`'s fp32 scale as the format rounds it."""
        return scale

    def read(self, matrix: QuantizedMatrix) -> Tensor:
        """The weights that the format's client computes from stored codes and scales, in its type."""
        return matrix.values()


@dataclass(frozen=True)
class PlainEncoding(Encoding):
    """The values themselves; for a quantized matrix, those on its grid."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def refusal(self, parameter: SourceParameter) -> str | None:  # noqa: ARG002 - it holds any
        return None

    def size(self, parameter: SourceParameter) -> int:
        return parameter.numel * self.dtype.itemsize

    def read(self, matrix: QuantizedMatrix) -> Tensor:
        return matrix.values(self.dtype)


@dataclass(frozen=True)
class StoredParameter:
    parameter: SourceParameter
    encoding: Encoding
    fallback: str | None = None
    """Why the encoding is not the format's first choice."""

    @property
    def size(self) -> int:
        return self.encoding.size(self.parameter)


@dataclass
class ExportLayout:
    """What is exported and how. Reads the checkpoint one parameter at a time."""

    source: ExportSource
    entries: list[StoredParameter]
    rounding: dict[str, float] = field(default_factory=dict)
    """Parameter -> largest relative rounding of its stored scales; filled while they are read."""

    def matrix(self, entry: StoredParameter) -> QuantizedMatrix:
        """Codes, and scales as the encoding stores them. UserError for a scale that its type cannot hold."""
        matrix = self.source.matrix(entry.parameter)
        stored = entry.encoding.stored_scale(matrix.scale)
        if not (torch.isfinite(stored).all() and (stored > 0).all()):
            worst = matrix.scale.max() if not torch.isfinite(stored).all() else matrix.scale.min()
            problem = f"{entry.encoding.name} has no scale of {float(worst):.3g}, which {entry.parameter} needs."
            raise UserError("--format", None, problem, "Choose hf.")
        self.rounding[entry.parameter.name] = float(((stored - matrix.scale).abs() / matrix.scale).max())
        return replace(matrix, scale=stored)

    def stored(self, entry: StoredParameter) -> Tensor:
        """The weights as a client reads them from the file, [shape of the parameter]."""
        if entry.parameter.quantizer is None:
            assert isinstance(entry.encoding, PlainEncoding)
            return self.source.plain(entry.parameter).to(entry.encoding.dtype)
        return entry.encoding.read(self.matrix(entry))

    def ideal_size(self, parameter: SourceParameter) -> float:
        """Bytes: N·B/8 and the scales in training's type; an unquantized parameter in training's type."""
        itemsize = self.source.dtype.itemsize
        if parameter.quantizer is None:
            return parameter.numel * itemsize
        return parameter.numel * parameter.quantizer.bits / 8 + parameter.scales * itemsize

    def fallback_cost(self, entry: StoredParameter) -> float:
        """Bytes beyond the ideal of an entry that is not in its first choice; 0 for the others."""
        return entry.size - self.ideal_size(entry.parameter) if entry.fallback else 0.0
