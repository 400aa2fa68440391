"""The report of a switch, for logs, tracking and the terminal. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qatlaw.bit_widths import bits_label
from qatlaw.effective_bits import StoredWeights
from qatlaw.text import plural
from qatscale.errors import FailedError
from qatscale.quant.bit_widths import get_quantizer


class NothingQuantizedError(FailedError):
    """Weights or scales that stay as they are: the run would be called QAT without being it."""


@dataclass(frozen=True)
class ModuleReport:
    """One quantized weight matrix. Layers that share it are one entry."""

    names: tuple[str, ...]
    bits: float
    shape: tuple[int, ...]
    scales: int
    scale_bits: int
    """Bits of one scale as forward uses it: 16 under bf16, else 32."""
    squared_error: float
    squared_norm: float

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_bits(self) -> int:
        """A code takes an integer number of bits."""
        return self.numel * math.ceil(self.bits) + self.scales * self.scale_bits

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of storage per weight, including scales."""
        return self.stored_bits / self.numel

    @property
    def relative_error(self) -> float:
        """||quantized - w|| / ||w||, Frobenius; 0 for zeros that stay zeros, infinite for zeros that do not."""
        return _relative_error([self])

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names), "bits": self.bits, "quantizer": get_quantizer(self.bits).name,
            "shape": list(self.shape), "weights": self.numel, "scales": self.scales,
            "bits_per_weight": self.bits_per_weight,
            "bytes": math.ceil(self.stored_bits / 8), "relative_error": _finite(self.relative_error),
        }  # fmt: skip


@dataclass(frozen=True)
class SwitchReport:
    """The matrices that one switch from full precision to QAT quantized, and the layers that it left out."""

    step: int
    """Optimizer steps taken before the switch."""
    modules: tuple[ModuleReport, ...]
    left_out: dict[str, str]
    """Name of every other Linear and Embedding -> why it stays in full precision."""
    params: int
    """Parameters of the model without scales, quantized or not."""

    @property
    def layers(self) -> int:
        """Quantized layers; more than `modules` where layers share a weight."""
        return sum(len(module.names) for module in self.modules)

    @property
    def weights(self) -> int:
        return sum(module.numel for module in self.modules)

    @property
    def quantized(self) -> dict[float, tuple[int, int]]:
        """Bits, ascending -> (weights, scales)."""
        found: dict[float, tuple[int, int]] = {}
        for module in self.modules:
            weights, scales = found.get(module.bits, (0, 0))
            found[module.bits] = weights + module.numel, scales + module.scales
        return dict(sorted(found.items()))

    def check(self, planned: StoredWeights) -> None:
        """NothingQuantizedError where the quantized weights and scales are not those that the recipe plans."""
        if self.quantized != planned.quantized:
            raise NothingQuantizedError(
                f"the switch at step {self.step} quantized {_counts(self.quantized)}, and the recipe plans "
                f"{_counts(planned.quantized)}. In full precision: {', '.join(self.left_out) or 'no layer'}."
            )

    @property
    def bits_per_weight(self) -> float:
        """Mean over the quantized weights, including scales."""
        return sum(module.stored_bits for module in self.modules) / self.weights

    @property
    def bytes(self) -> int:
        """Storage of the quantized weights with their scales."""
        return math.ceil(sum(module.stored_bits for module in self.modules) / 8)

    @property
    def relative_error(self) -> float:
        return _relative_error(self.modules)

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step, "layers": self.layers, "weights": self.weights, "params": self.params,
            "quantized": {f"{bits:g}": weights for bits, (weights, _) in self.quantized.items()},
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes, "relative_error": _finite(self.relative_error),
            "modules": [module.to_dict() for module in self.modules], "left_out": dict(self.left_out),
        }  # fmt: skip

    def table(self) -> Any:
        """A `TextTable` with a row per kind of layer (the last part of its name), bits and shape."""
        from qatlaw.text_table import TextTable

        kinds: dict[tuple[str, float, tuple[int, ...]], list[ModuleReport]] = {}
        for module in self.modules:
            kind = " = ".join(name.rsplit(".", 1)[-1] for name in module.names)
            kinds.setdefault((kind, module.bits, module.shape), []).append(module)
        share = self.weights / self.params
        table = TextTable(
            ("layer", "count", "bits", "quantizer", "shape", "weights", "bits/weight", "MiB", "relative error"),
            words=["layer"],
            title=f"QAT from step {self.step:,}: {plural(self.layers, 'layer')}, {share:.1%} of all weights",
            drop=("quantizer", "MiB", "count", "shape"),
            caption=f"In full precision: {', '.join(self.left_out)}." if self.left_out else "",
            footer=_cells("all", self.modules, "", "", ""),
        )
        for (kind, bits, shape), modules in kinds.items():
            table.add_row(*_cells(kind, modules, f"{bits:g}", get_quantizer(bits).name, " x ".join(map(str, shape))))
        return table

    def __str__(self) -> str:
        return str(self.table().text(120))


def merge_reports(reports: Sequence[SwitchReport], params: int) -> SwitchReport:
    """One report from those of a model's parts. A table that two parts share is one entry with both names.

    params: of the entire model.
    """
    merged: dict[tuple[Any, ...], ModuleReport] = {}
    for module in (module for report in reports for module in report.modules):
        # an embedding and a tied head on two stages have the same numbers
        key = (module.shape, module.squared_error, module.squared_norm)
        names = (*merged[key].names, *module.names) if key in merged else module.names
        merged[key] = replace(module, names=names)
    left_out = {name: why for report in reports for name, why in report.left_out.items()}
    return SwitchReport(reports[0].step, tuple(merged.values()), left_out, params)


def _cells(kind: str, modules: Sequence[ModuleReport], *common: str) -> tuple[str, ...]:
    """A row of the table. common: bits, quantizer and shape of the modules."""
    stored, weights = sum(m.stored_bits for m in modules), sum(m.numel for m in modules)
    sizes = (f"{weights:,}", f"{stored / weights:.3f}", f"{stored / 8 / 2**20:.2f}")
    return kind, str(len(modules)), *common, *sizes, f"{_relative_error(modules):.4f}"


def _counts(quantized: Mapping[float, tuple[int, int]]) -> str:
    texts = (f"{w:,} weights with {s:,} scales at {bits_label(bits)}" for bits, (w, s) in quantized.items())
    return ", ".join(texts) or "nothing"


def _relative_error(modules: Sequence[ModuleReport]) -> float:
    squared_error, squared_norm = (sum(m.squared_error for m in modules), sum(m.squared_norm for m in modules))
    if squared_norm == 0:
        return 0.0 if squared_error == 0 else math.inf
    return math.sqrt(squared_error / squared_norm)


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
