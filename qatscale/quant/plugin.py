"""QAT as a plugin of a training loop: three methods, prepare, maybe_switch and state.

A loop of plain PyTorch::

    plugin = QatPlugin(QatConfig(scheme="fused", bits=2), switch_step=1000)
    plugin.prepare(model)                    # before the optimizer (or deepspeed.initialize) sees the parameters
    optimizer = AdamW(plugin.parameter_groups(lr, weight_decay=0.1))
    masters = PlainMasters(optimizer)
    for step in range(steps):
        report = plugin.maybe_switch(step, masters)
        ...
        optimizer.step()

Scales exist from the start, inert, so that optimizer groups, partitions and checkpoints are the same on both sides of
the switch. Optimizer steps with 0-based index >= switch_step run quantized.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qatlaw.text import plural
from qatscale.config.schema import QatConfig
from qatscale.errors import UserError
from qatscale.model.tensor_parallel import full_shape
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.layers import FAKE_QUANT, FakeQuant, FakeQuantLayer
from qatscale.quant.report import ModuleReport, NothingQuantizedError, SwitchReport
from qatscale.quant.scales import initial_scale
from qatscale.quant.selection import Selection, fake_quant_modules, select
from qatscale.quant.views import view

__all__ = ["Masters", "NothingQuantizedError", "PlainMasters", "QatPlugin", "SwitchReport", "scale_groups", "view"]


class Masters(Protocol):
    """Access to fp32 masters. `full` and `assign` may be collective: every process calls them in the same order."""

    def full(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's fp32 master, in its full shape. Do not write to it."""
        ...

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets master and working copy to `value`, fp32, in the parameter's full shape."""
        ...

    def reset_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Zeroes Adam's moments and step count. `parameters` are all those of one or more optimizer groups."""
        ...


class PlainMasters:
    """Masters for a plain PyTorch loop, where the parameters are their own masters: hold them in fp32.

    TypeError for DeepSpeed's ZeRO and for DTensors (FSDP, tensor parallelism), whose parameters are parts or copies.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if (zero := zero_optimizer(optimizer)) is not None:
            raise TypeError(f"{type(zero).__name__} {_ZERO}")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _check_plain(parameter)
        self._optimizer = optimizer

    def full(self, parameter: nn.Parameter) -> Tensor:
        _check_plain(parameter)
        return parameter.detach().float()

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        if value.shape != parameter.shape:
            raise ValueError(f"a value of shape {list(value.shape)} for a parameter of shape {list(parameter.shape)}")
        parameter.copy_(value)

    def reset_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """ValueError for a parameter that the optimizer does not have, because it would never move."""
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for parameter in parameters:
            if id(parameter) not in known:
                raise ValueError(
                    f"a parameter of shape {list(parameter.shape)} is in no group of the optimizer; "
                    "build the optimizer after prepare(model)"
                )
            # Before its first step a parameter has no state; that step starts it at zero.
            state = self._optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0


_ZERO = (
    "keeps fp32 masters in flat partitions, which PlainMasters cannot reach. Use ZeroMasters, as "
    "qatscale.engine.trainer_callback.masters_of(optimizer, model) makes it, or QatCallback with transformers' Trainer."
)


def zero_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's ZeRO inside an optimizer that accelerate may have wrapped; None where there is none."""
    while optimizer is not None and not type(optimizer).__module__.startswith("deepspeed."):
        optimizer = optimizer.__dict__.get("optimizer")
    return optimizer


def _check_plain(parameter: nn.Parameter) -> None:
    """TypeError for a parameter that is not its own fp32 master."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        raise TypeError(f"DeepSpeed's ZeRO {_ZERO}")
    if type(parameter.data).__name__ == "DTensor":
        raise TypeError("a parameter is a DTensor, of which this process has a part; FSDP is not supported.")


class QatPlugin:
    """Prepares a model for QAT and switches QAT on, once.

    switch_step: optimizer steps before the switch; 0 = QAT from the start, None = never (scheme `fp`, and only there).
    include, exclude: patterns of names, see `selection.select`. Any other matrix whose name is not one of those that
    are quantized is an error in `prepare`.
    """

    def __init__(
        self, qat: QatConfig, switch_step: int | None, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        if (switch_step is None) != (qat.scheme == "fp"):
            raise ValueError(f"switch_step {switch_step} does not go with scheme {qat.scheme!r}")
        self.qat = qat
        self.switch_step = switch_step
        self._include, self._exclude = include, exclude
        self.switched_at: int | None = None
        self._model: nn.Module | None = None
        self._selection = Selection((), {})
        self._params = 0
        self._at_switch: dict[str, str] = {}
        """Layer name -> digest of its scale right after the switch."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Converts the layers to quantize, in place, and returns `model`, which computes the same as before.

        Call it before the optimizer is built. Parameters stay the same objects; layers that share a weight share one
        scale. A second call changes nothing. UserError where the model was prepared with other settings.
        """
        selection = select(model, self.qat, self._include, self._exclude)
        wanted = {id(target.module) for target in selection.targets}
        for name, layer in fake_quant_modules(model):
            if id(layer) not in wanted:
                raise UserError(f"model.{name}", "a prepared layer", "is not one that this recipe quantizes.", _FRESH)
        scales: dict[int, nn.Parameter] = {}
        """Id of a weight -> its scale, for layers that share the weight."""
        for target in selection.targets:
            module, bits = target.module, target.rule.at(self.qat.bits)
            if not isinstance(module, FakeQuant):
                FAKE_QUANT[type(module)].convert(
                    module,
                    bits,
                    rule=target.rule,
                    group_size=self.qat.group_size,
                    scale=scales.get(id(module.weight)),
                    use_grad_factor=self.qat.scale_gradient_factor,
                )
            assert isinstance(module, FakeQuant)
            if (module.quantizer.bits, module.group_size) != (bits, self.qat.group_size):
                prepared = f"prepared at {module.quantizer.bits:g} bits, group size {module.group_size}"
                problem = f"this recipe says {bits:g} bits, group size {self.qat.group_size}."
                raise UserError(f"model.{target.name}", prepared, problem, _FRESH)
            scales[id(module.weight)] = module.weight_scale
        self._model, self._selection = model, selection
        of_scales = {id(layer.weight_scale) for _, layer in fake_quant_modules(model)}
        self._params = sum(math.prod(full_shape(p)) for p in model.parameters() if id(p) not in of_scales)
        return model

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The prepared model's matrices (decayed), norms and biases, and one group per bit width of scales.

        `lr_ratio` is the group's rate over the schedule's. A scale of b bits is about 1/Qp of the row's largest weight,
        and Adam moves every parameter by about the rate: at the weights' rate a scale of 8 bits would be gone in one
        step. So it is `scale_lr_ratio`.
        """
        scales = scale_groups(self._prepared())
        of_scales = {id(p) for group in scales.values() for p in group}
        weights = [p for p in self._prepared().parameters() if p.requires_grad and id(p) not in of_scales]
        groups = [
            {"name": "matrices", "params": [p for p in weights if _dimensions(p) >= 2], "lr_ratio": 1.0},
            {"name": "norms", "params": [p for p in weights if _dimensions(p) < 2], "lr_ratio": 1.0},
            *({"name": f"scales_{bits:g}bit", "params": group, "lr_ratio": self.scale_lr_ratio(bits)}
              for bits, group in scales.items()),
        ]  # fmt: skip
        return [{**group, "decayed": group["name"] == "matrices"} for group in groups if group["params"]]

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """`optimizer_groups` for an optimizer of the Adam family, with the rate and decay of each."""
        return [
            {"params": group["params"], "lr": lr * group["lr_ratio"], "weight_decay": weight_decay * group["decayed"]}
            for group in self.optimizer_groups()
        ]

    def scale_lr_ratio(self, bits: float) -> float:
        """The learning rate of the scales of a bit width over that of the weights."""
        return get_quantizer(bits).scale_lr_ratio if self.qat.scale_lr_ratio == "auto" else self.qat.scale_lr_ratio

    def maybe_switch(self, step: int, masters: Masters) -> SwitchReport | None:
        """Switch to QAT if `step`, the 0-based optimizer step about to be taken, is the switch step or lies after it.

        Call it before every step. Returns the report where it switches, which it does once, and None otherwise.
        Collective where it switches. NothingQuantizedError if the switch changes no weight, or if the model has lost a
        layer that `prepare` converted. FloatingPointError if weights are not finite.
        """
        if self.switch_step is None or self.switched_at is not None or step < self.switch_step:
            return None
        self._check_layers(step)
        reports = tuple(_calibrate(names, layer, masters) for names, layer in matrices(self._prepared()))
        if not any(report.squared_error > 0 for report in reports):
            raise NothingQuantizedError(f"the switch at step {step} changes none of {len(reports)} weight matrices")
        groups = scale_groups(self._prepared())
        for scales in groups.values():
            masters.reset_state(scales)
        if self.qat.optimizer_state == "reset":
            of_scales = {id(scale) for scales in groups.values() for scale in scales}
            masters.reset_state([p for p in self._prepared().parameters() if id(p) not in of_scales])
        self._turn(on=True)
        self.switched_at = step
        self._at_switch = self._digests(masters)
        return SwitchReport(step, reports, self._selection.left_out, self._params)

    def _check_layers(self, step: int) -> None:
        """Another library may have replaced or wrapped a layer since `prepare`."""
        present = {id(layer) for _, layer in fake_quant_modules(self._prepared())}
        targets = self._selection.targets
        lost = [target.name for target in targets if id(target.module) not in present]
        if lost:
            raise NothingQuantizedError(
                f"the switch at step {step} does not reach {len(lost)} of {plural(len(targets), 'layer')}: "
                f"{', '.join(lost[:4])}{' ...' if len(lost) > 4 else ''}. They were replaced after prepare(model)."
            )

    def check_moving(self, masters: Masters) -> None:
        """Raises NothingQuantizedError where all scales of a layer still have their values from the switch.

        Collective. Call it once, after steps with a learning rate above 0.
        """
        if self.switched_at is None:
            raise NothingQuantizedError("the scales cannot move: the model has not switched to QAT")
        now = self._digests(masters)
        still = [name for name, digest in now.items() if digest == self._at_switch[name]]
        if still:
            shown = ", ".join(still[:4]) + (" ..." if len(still) > 4 else "")
            raise NothingQuantizedError(
                f"the scales of {len(still)} of {plural(len(now), 'layer')} have not moved since the switch at step "
                f"{self.switched_at}: {shown}. Are they in the optimizer's groups, with a learning rate above 0?"
            )

    def export(
        self, model: nn.Module, folder: Path | str, masters: Masters | None = None, tokenizer: Any = None
    ) -> None:
        """Write the quantized model as a Hugging Face folder; `qatscale export FOLDER` makes other formats of it.

        masters: under ZeRO, where every process calls this. See `model_folder.write_model`.
        """
        from qatscale.quant.model_folder import write_model

        full = masters.full if masters else lambda parameter: parameter.detach().float()
        write_model(model, self.qat, self.state(), Path(folder), full, tokenizer)

    def state(self) -> dict[str, Any]:
        """The plugin's state as JSON-able data. The scales are parameters, saved with the model."""
        layers = {name: layer.quantizer.bits for name, layer in fake_quant_modules(self._prepared())}
        return {
            "switched_at": self.switched_at,
            "group_size": self.qat.group_size,
            "bits": layers,
            "scales_at_switch": {name: self._at_switch[name] for name in layers if name in self._at_switch},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a `state()`. It does not load the model's parameters.

        UserError where bits or groups differ from those of a state after the switch; before it they may differ.
        """
        switched_at = state["switched_at"]
        if switched_at is not None:
            present = self.state()
            # a pipeline stage has some of the layers; each layer is compared on its own stage
            saved_bits = {name: state["bits"].get(name) for name in present["bits"]}
            for key, value, saved in (
                ("qat.group_size", present["group_size"], state["group_size"]),
                ("qat.bits", present["bits"], saved_bits),
            ):
                if value != saved:
                    raise UserError(
                        key, _distinct(value),
                        f"the checkpoint switched to QAT at step {switched_at} with {_distinct(saved)}.",
                        "Bits and groups stay as they are after the switch; branch from a checkpoint before it.",
                    )  # fmt: skip
        self.switched_at = switched_at
        self._at_switch = dict(state["scales_at_switch"])
        self._turn(on=switched_at is not None)

    def _turn(self, *, on: bool) -> None:
        for _, layer in fake_quant_modules(self._prepared()):
            layer.calibrated = on
            layer.mode = "learned" if on else "off"

    def _digests(self, masters: Masters) -> dict[str, str]:
        digests: dict[str, str] = {}
        for names, layer in matrices(self._prepared()):
            digests |= dict.fromkeys(names, _digest(masters.full(layer.weight_scale)))
        return digests

    def _prepared(self) -> nn.Module:
        if self._model is None:
            raise RuntimeError("QatPlugin.prepare(model) comes first")
        return self._model


_FRESH = "Bits and groups are set once per model object: build the model anew to change them."


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One `state()` from those of a model's parts, which several processes hold."""
    merged: dict[str, Any] = {}
    for state in states:
        merged = {**merged, **state, **{key: merged.get(key, {}) | state[key] for key in ("bits", "scales_at_switch")}}
    return merged


def scale_groups(model: nn.Module) -> dict[float, list[nn.Parameter]]:
    """Bits, ascending -> the scales of that bit width, each once, in the model's order. Each is an optimizer group.

    Scales get no weight decay, and `QatPlugin.scale_lr_ratio(bits)` times the weights' learning rate.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for _, layer in matrices(model):
        groups.setdefault(layer.quantizer.bits, []).append(layer.weight_scale)
    return dict(sorted(groups.items()))


def matrices(model: nn.Module) -> list[tuple[tuple[str, ...], FakeQuantLayer]]:
    """Every quantized weight matrix once: the names of the layers that share it, and the first such layer."""
    by_scale: dict[int, tuple[list[str], FakeQuantLayer]] = {}
    for name, layer in fake_quant_modules(model):
        by_scale.setdefault(id(layer.weight_scale), ([], layer))[0].append(name)
    return [(tuple(names), layer) for names, layer in by_scale.values()]


def _calibrate(names: tuple[str, ...], layer: FakeQuantLayer, masters: Masters) -> ModuleReport:
    """Sets one scale from the fp32 master of its weight, and measures the error of the weight that forward will use."""
    quantizer, weight, parameter = layer.quantizer, layer.weight, layer.weight_scale
    master = masters.full(weight)
    if not torch.isfinite(master).all():
        raise FloatingPointError(f"{names[0]}.weight holds NaN or infinity at the switch")
    scale = initial_scale(quantizer, master, layer.group_size, parameter.dtype)
    masters.assign(parameter, scale)
    # In bf16 forward uses rounded weights and scales. Rounding alone does not count as quantization error.
    working = master.to(weight.dtype)
    error = (fake_quantize(quantizer, working, scale.to(parameter.dtype)).detach() - working).float()
    return ModuleReport(
        names=names, bits=quantizer.bits, shape=tuple(master.shape), scales=scale.numel(),
        scale_bits=8 * parameter.element_size(), squared_error=float(error.square().sum(dtype=torch.float64)),
        squared_norm=float(working.float().square().sum(dtype=torch.float64)),
    )  # fmt: skip


def _dimensions(parameter: Tensor) -> int:
    """Also where ZeRO-3 has divided it, which leaves nothing of its shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _digest(scale: Tensor) -> str:
    return hashlib.sha256(scale.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _distinct(value: Any) -> Any:
    """The distinct values of a mapping; anything else as it is."""
    return sorted(set(value.values()), key=str) if isinstance(value, Mapping) else value
