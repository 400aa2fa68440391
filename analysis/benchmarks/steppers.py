"""Optimizer steps that are timed against each other: through the DeepSpeed engine, and in bare PyTorch loops.

All take the same batch, in the same micro-batches, with AdamW of the same groups and settings and the same clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatscale.config.ds_config import merge_ds_config, precision_of, run_ds_config
from qatscale.config.schedule_section import Phase
from qatscale.config.schema import RunConfig
from qatscale.engine.compilation import Compilation
from qatscale.engine.layout import Layout
from qatscale.engine.runtime import Runtime
from qatscale.engine.step import apply_settings, train_step
from qatscale.model.initial_weights import initialise
from qatscale.model.llama import Llama
from qatscale.quant.plugin import PlainMasters, QatPlugin
from qatscale.schedule.timeline import StepSettings
from qatscale.train.setup import assemble

RATE = 1e-6
"""AdamW's rate: random tokens leave the weights about where they are, so that all steps are alike."""
LossOf = Callable[[Tensor, Tensor], Tensor]
"""(tokens [b, t], labels [b, t]) → their mean loss."""


@dataclass
class Stepper:
    """Something that takes an optimizer step at a call, and gives the mean loss of its last micro-batch."""

    name: str
    step: Callable[[], Tensor]
    close: Callable[[], None] = lambda: None


def batch_of(config: RunConfig, device: torch.device) -> Tensor:
    """One batch [sequences, t + 1] of random tokens, the same for all."""
    shape = (config.batch.sequences, config.data.sequence_length + 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.model.vocab_size, shape, generator=generator).to(device)


def engine_stepper(
    name: str, config: RunConfig, runtime: Runtime, *, quantized: bool, compiled: bool = False
) -> Stepper:
    """The step of a training run on one process: DeepSpeed under the recipe's ds_config."""
    step, close = training_step(config, runtime, quantized=quantized, compiled=compiled)
    return Stepper(name, partial(step, batch_of(config, runtime.device)), close)


def training_step(
    config: RunConfig, runtime: Runtime, *, quantized: bool = True, compiled: bool = False
) -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    """(batch [sequences, t + 1] → loss of its last micro-batch, what ends it), through DeepSpeed on one process."""
    config, layout = _from_step_0(config, compiled), Layout()
    ds_config = merge_ds_config(config, run_ds_config(config), layout.data)
    job = assemble(config, layout, ds_config, runtime, switch_step=0)
    if quantized:
        job.plugin.maybe_switch(0, job.masters)
    settings = _settings(config, quantized)

    def step(batch: Tensor) -> Tensor:
        apply_settings(job.engine, settings)
        losses = train_step(job.engine, batch, config.batch.micro_batch, job.topology)
        return [loss.detach() for loss in losses][-1]

    def close() -> None:
        job.engine.destroy()

    return step, close


def bare_stepper(name: str, config: RunConfig, runtime: Runtime, *, quantized: bool, compiled: bool = False) -> Stepper:
    """The same model in a loop of a dozen lines, without DeepSpeed: the most that its step could give."""
    config = _from_step_0(config, compiled)
    model = Llama(config.model, config.engine.activation_checkpointing)
    initialise(model, config.seed)
    plugin = QatPlugin(config.qat, 0)
    plugin.prepare(model)
    model.to(runtime.device)
    precision = precision_of(run_ds_config(config))
    loop = BareLoop(model, plugin.optimizer_groups(), config, batch_of(config, runtime.device), precision)
    if quantized:
        plugin.maybe_switch(0, loop.masters)
    Compilation(model, "on" if compiled else "off")
    return Stepper(name, partial(loop.step, model), lambda: None)


def _from_step_0(config: RunConfig, compiled: bool) -> RunConfig:
    """The recipe with QAT due before the first step."""
    qat = config.qat.model_copy(update={"scheme": "scratch"})
    engine = config.engine.model_copy(update={"compile": "on" if compiled else "off"})
    return config.model_copy(update={"qat": qat, "engine": engine})


def _settings(config: RunConfig, quantized: bool) -> StepSettings:
    optimizer = config.optimizer
    phase: Phase = "qat_stable" if quantized else "stable"
    return StepSettings(phase, quantized, RATE, optimizer.betas, optimizer.weight_decay)


class BareLoop:
    """Forward, backward, clipping and AdamW (fused) on a batch; bf16 weights over fp32 masters, as DeepSpeed has it."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        config: RunConfig,
        batch: Tensor,
        precision: str,
    ) -> None:
        self.micro_batches = [
            (p[:, :-1].contiguous(), p[:, 1:].contiguous()) for p in batch.split(config.batch.micro_batch)
        ]
        self.clipping = config.optimizer.gradient_clipping
        self.weights = [p for group in groups for p in group["params"]]
        self.own: list[Tensor] = self.weights
        decay = config.optimizer.weight_decay
        if precision == "bf16":
            self.own = [nn.Parameter(p.detach().float()) for p in self.weights]
            model.to(torch.bfloat16)
        own = iter(self.own)
        self.adam = torch.optim.AdamW(
            [
                {
                    "params": [next(own) for _ in group["params"]],
                    "lr": RATE * group["lr_ratio"],
                    "weight_decay": decay if group["decayed"] else 0.0,
                }
                for group in groups
            ],
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )
        self.masters = _Masters(self)

    def step(self, loss_of: LossOf) -> Tensor:
        """One optimizer step."""
        for tokens, labels in self.micro_batches:
            loss = loss_of(tokens, labels)
            (loss / len(self.micro_batches)).backward()
            if self.own is not self.weights:
                self._accumulate()
        if self.clipping:
            nn.utils.clip_grad_norm_(self.own, self.clipping, foreach=True)
        self.adam.step()
        self.adam.zero_grad()
        if self.own is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.own)
        return loss.detach()

    @torch.no_grad()
    def _accumulate(self) -> None:
        for weight, own in zip(self.weights, self.own, strict=True):
            if weight.grad is not None:
                own.grad = weight.grad.float() if own.grad is None else own.grad.add_(weight.grad)
                weight.grad = None


class _Masters(PlainMasters):
    """The masters of a bare loop, which in bf16 lie beside the weights."""

    def __init__(self, loop: BareLoop) -> None:
        super().__init__(loop.adam)
        self._of = {id(weight): own for weight, own in zip(loop.weights, loop.own, strict=True)}

    def full(self, parameter: nn.Parameter) -> Tensor:
        return self._of[id(parameter)].detach().float()

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        self._of[id(parameter)].copy_(value)
        parameter.copy_(value)

    def reset_state(self, parameters: Any) -> None:
        """No step was taken, so nothing needs a reset."""
