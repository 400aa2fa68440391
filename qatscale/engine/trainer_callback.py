"""QAT in transformers' Trainer: the switch before the right optimizer step, alone or under DeepSpeed's ZeRO."""

# ruff: noqa: ARG002 - the signatures are transformers'

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qatscale.engine.zero_masters import ZeroMasters
from qatscale.errors import UserError
from qatscale.files import write_json
from qatscale.quant.plugin import Masters, PlainMasters, QatPlugin, zero_optimizer
from qatscale.untrusted import read_object

FILE = "qat_plugin.json"
"""In each checkpoint folder of the Trainer: the plugin's state."""


def masters_of(optimizer: Any, model: nn.Module) -> Masters:
    """Access to the fp32 masters in a loop that is not ours: its own code, accelerate, transformers' Trainer.

    optimizer: PyTorch's, or ZeRO's (1 to 3) as `deepspeed.initialize` returns it, perhaps wrapped by accelerate. model:
    the module that the plugin prepared.
    """
    zero = zero_optimizer(optimizer)
    if zero is None:
        return PlainMasters(optimizer)
    from deepspeed.accelerator import get_accelerator

    is_stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    stage = 3 if is_stage3 else 2 if getattr(zero, "partition_gradients", False) else 1
    device = torch.device(get_accelerator().current_device_name())
    engine = SimpleNamespace(optimizer=zero, device=device, zero_optimization_stage=lambda: stage)
    return ZeroMasters(engine, {parameter: name for name, parameter in model.named_parameters()})


class QatCallback(TrainerCallback):
    """Switches to QAT before optimizer step `plugin.switch_step`, prints the report, saves and restores the state.

    The model is prepared before the Trainer gets it, and the optimizer is built from the plugin's groups::

        plugin.prepare(model)
        qat = QatCallback(plugin)
        Trainer(model, args, optimizer_cls_and_kwargs=qat.adamw(lr, weight_decay), callbacks=[qat], ...)

    (Under DeepSpeed the Trainer drops an optimizer that is passed as `optimizers`.)
    """

    def __init__(self, plugin: QatPlugin) -> None:
        self.plugin = plugin
        self.masters: Masters | None = None
        """From the first step on."""

    def adamw(
        self, lr: float, weight_decay: float = 0.0, **settings: Any
    ) -> tuple[type[torch.optim.AdamW], dict[str, Any]]:
        """The Trainer's `optimizer_cls_and_kwargs`: AdamW on the plugin's groups. settings: further ones of AdamW."""

        plugin = self.plugin

        class PluginAdamW(torch.optim.AdamW):
            def __init__(self, _: Any, **settings: Any) -> None:  # the Trainer's own groups
                super().__init__(plugin.parameter_groups(lr, weight_decay), **settings)

        return PluginAdamW, settings

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.masters is None:
            self.masters = masters_of(kwargs["optimizer"], kwargs["model"])
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            if state.global_step > (self.plugin.switch_step or state.global_step) and not saved.is_file():
                problem = "is missing: the scales of the checkpoint would be set anew."
                raise UserError("checkpoint", str(saved), problem, "Copy it into args.output_dir with the checkpoint.")
            if state.global_step and saved.is_file():
                self.plugin.load_state(read_object(saved, "checkpoint"))
        report = self.plugin.maybe_switch(state.global_step, self.masters)
        if report is not None and state.is_world_process_zero:
            print(report)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE, self.plugin.state())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """NothingQuantizedError where scales have not moved since the switch."""
        if self.plugin.switched_at is not None and state.global_step > self.plugin.switched_at:
            assert self.masters is not None
            self.plugin.check_moving(self.masters)
