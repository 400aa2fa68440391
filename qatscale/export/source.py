"""The exported checkpoint: its recipe, and one at a time its parameters as the trained forward pass saw them.

Codes are those of training's quantizer with the very scale of the forward pass. DeepSpeed's bf16 mode casts weights and
scales to bf16, so both are rounded here before anything is computed from them. Checkpoints of any layout are read; at
most one parameter is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatlaw.bit_widths import UNQUANTIZED_BITS
from qatscale.config.ds_config import precision_of, run_ds_config
from qatscale.config.schema import ModelConfig, QatConfig, RunConfig
from qatscale.engine.checkpoints.manifest import Manifest
from qatscale.engine.checkpoints.reader import CheckpointReader, only_data, open_checkpoint
from qatscale.errors import UserError
from qatscale.export.plugin_source import PluginFolder
from qatscale.export.quantized_matrix import QuantizedMatrix
from qatscale.model.llama import Llama, parameter_shapes
from qatscale.quant.bit_widths import Quantizer, get_quantizer
from qatscale.quant.model_folder import SETTINGS
from qatscale.quant.reference import encode
from qatscale.quant.scales import ptq_scale
from qatscale.quant.selection import select
from qatscale.schedule.build import build_timeline
from qatscale.tensor_files import not_finite
from qatscale.tracking.run_folder import RunFolder


@dataclass(frozen=True)
class SourceParameter:
    """One parameter of the model, and how training quantized it."""

    name: str
    """Name in our Llama; a tied head is the embedding."""
    shape: tuple[int, ...]
    quantizer: Quantizer | None
    """None = stays in full precision."""
    groups: int = 1
    """Scales per row."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return self.shape[-1] // self.groups

    @property
    def scales(self) -> int:
        return self.shape[0] * self.groups if self.quantizer else 0

    @property
    def is_vector(self) -> bool:
        """A norm or a bias."""
        return len(self.shape) == 1

    @property
    def is_table(self) -> bool:
        """Looked up by token: the embedding, also where it is the head too."""
        return self.name == "embed.weight"

    def __str__(self) -> str:
        bits = f"{self.quantizer.bits_text} bits, " if self.quantizer else ""
        return f"{self.name} ({bits}{' x '.join(map(str, self.shape))})"


@dataclass
class ExportSource:
    folder: Path
    config: RunConfig
    dtype: torch.dtype
    """Type of weights and scales in training's forward pass: fp32 or bf16."""
    manifest: Manifest
    ptq_bits: float | None
    """Bits of post-training quantization, whose scales are searched for now; None = scales were trained."""
    parameters: list[SourceParameter]
    reader: CheckpointReader | PluginFolder = field(repr=False)
    _last: tuple[str, QuantizedMatrix] | None = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        return build_timeline(self.config).steps

    @property
    def is_imported(self) -> bool:
        """Whether the run imported the model, so that its step does not show whether training is finished."""
        return self.manifest.reason == "imported"

    @property
    def is_unfinished(self) -> bool:
        return not self.is_imported and self.manifest.step < self.steps

    @property
    def view(self) -> str:
        """The name of what is exported among the views of `qatscale evaluate`."""
        if self.ptq_bits is not None:
            return f"ptq{self.ptq_bits:g}"
        return "fp" if self.manifest.switched_at is None else "quantized"

    @property
    def bits(self) -> float:
        """Bits per quantized weight of what is exported."""
        if self.ptq_bits is not None:
            return self.ptq_bits
        return UNQUANTIZED_BITS if self.manifest.switched_at is None else self.config.qat.bits

    def plain(self, parameter: SourceParameter) -> Tensor:
        """The parameter itself in `dtype`. UserError where it holds NaN or infinity."""
        return self._read(parameter.name)

    def _read(self, name: str) -> Tensor:
        value = self.reader.parameter(name).to(self.dtype)
        if not_finite([(name, value)]):
            raise UserError("checkpoint", None, f"{name} holds NaN or infinity.", "Export an earlier checkpoint.")
        return value

    def matrix(self, parameter: SourceParameter) -> QuantizedMatrix:
        """Codes and scales. The last matrix is kept, for formats that ask for both in turn."""
        assert parameter.quantizer is not None
        if self._last is None or self._last[0] != parameter.name:
            self._last = None
            weight = self.plain(parameter)
            alpha = self._alpha(parameter, weight)
            codes = encode(parameter.quantizer, weight, alpha)
            self._last = parameter.name, QuantizedMatrix.from_codes(parameter.quantizer, codes, alpha)
        return self._last[1]

    def _alpha(self, parameter: SourceParameter, weight: Tensor) -> Tensor:
        assert parameter.quantizer is not None
        if self.ptq_bits is not None:
            return ptq_scale(parameter.quantizer, weight, self.config.qat.group_size)
        return self._read(f"{parameter.name}_scale")


def open_source(
    what: str, *, ptq_bits: float | None = None, unfinished: bool = False, data: Path | None = None
) -> ExportSource:
    """Open a checkpoint, named as `find_checkpoint` takes it. Every byte of it is checked.

    ptq_bits: quantize now, to this many bits; only where nothing was trained quantized.
    unfinished: accept a checkpoint from before the run's end.
    data: prepared data instead of the run's own.
    """
    if ((path := Path(what)) / SETTINGS).is_file():
        found = PluginFolder(path)
        config, plugin = found.config(data), found.manifest.plugin
        parameters = _parameters(config, plugin, ptq_bits)
        return ExportSource(path, config, found.dtype, found.manifest, ptq_bits, parameters, found)
    config, reader = open_checkpoint(what, only_data(data))
    precision = precision_of(run_ds_config(config))
    source = ExportSource(
        folder=reader.folder,
        config=config,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        manifest=reader.manifest,
        ptq_bits=ptq_bits,
        parameters=_parameters(config, reader.manifest.plugin, ptq_bits),
        reader=reader,
    )
    run = source.folder.resolve().parents[1]
    if (failure := RunFolder(run).failure) and not (source.is_unfinished or unfinished):
        fix = f"Finish it, `qatscale resume {run}`, or add --unfinished to export it as it stands."
        raise UserError("checkpoint", what, f"its run failed: {failure}", fix)
    if source.is_unfinished and not unfinished:
        at = f"is at step {source.manifest.step} of {source.steps}: its learning rate has not decayed"
        before_the_switch = config.qat.scheme != "fp" and source.manifest.switched_at is None
        missing = ", and it has not switched to QAT" if before_the_switch else ""
        end = (
            f"Give {run} for the run's end" if (run / "done.json").is_file() else f"Finish it, `qatscale resume {run}`"
        )
        raise UserError("checkpoint", what, f"{at}{missing}.", f"{end}, or add --unfinished to export it as it stands.")
    return source


def _parameters(config: RunConfig, plugin: dict[str, Any], ptq_bits: float | None) -> list[SourceParameter]:
    switched = plugin["switched_at"] is not None
    if ptq_bits is not None:
        if switched:
            trained = "the checkpoint has trained scales, which PTQ would discard."
            raise UserError("--ptq", ptq_bits, trained, "Leave it out.")
        get_quantizer(ptq_bits)
        bits = quantized_layers(config.model, config.qat, ptq_bits)
        group_size = config.qat.group_size
    else:
        bits = plugin["bits"] if switched else {}
        group_size = plugin["group_size"]
    return source_parameters(config.model, bits, group_size)


def quantized_layers(model: ModelConfig, qat: QatConfig, bits: float) -> dict[str, float]:
    """Layer -> its bits where a model is quantized to `bits`."""
    with torch.device("meta"):
        targets = select(Llama(model), qat).targets
    return {target.name: target.rule.at(bits) for target in targets}


def source_parameters(model: ModelConfig, bits: Mapping[str, float], group_size: int | None) -> list[SourceParameter]:
    """bits: by layer; one that is missing stays in full precision."""
    parameters = []
    for name, shape in parameter_shapes(model).items():
        width = bits.get(name.removesuffix(".weight"))
        quantizer = None if width is None else get_quantizer(width)
        groups = shape[-1] // group_size if quantizer and group_size else 1
        parameters.append(SourceParameter(name, shape, quantizer, groups))
    return parameters
