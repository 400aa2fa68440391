"""One optimizer step, and one evaluation, on the engine of any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from qatscale.engine.topology import Topology
from qatscale.schedule.timeline import StepSettings


def apply_settings(engine: Any, settings: StepSettings) -> None:
    """Give AdamW the rate, betas and weight decay of the step about to be taken."""
    for group in engine.optimizer.param_groups:
        group["lr"] = settings.learning_rate * group["lr_ratio"]
        group["betas"] = settings.betas
        group["weight_decay"] = settings.weight_decay if group["decayed"] else 0.0


def train_step(
    engine: Any,
    batch: Tensor,
    micro_batch: int,
    topology: Topology,
    timed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Tensor]:
    """Take one optimizer step on this process's share [sequences, t + 1] of the batch; gives the mean losses.

    One loss per micro-batch; from a pipeline one for the entire step, the mean over all its processes. timed: a context
    around each forward pass outside of pipelines. Collective.
    """
    micro_batches = ((part[:, :-1], part[:, 1:]) for part in _on_device(batch, micro_batch, engine))
    if topology.layout.pipeline > 1:
        engine.module.micro_batches, loaded = tee(micro_batches)
        yield engine.train_batch(loaded)
        return
    for tokens, labels in micro_batches:
        with timed():
            loss = engine(tokens, labels)
        engine.backward(loss)
        engine.step()  # steps the optimizer at the last micro-batch
        yield loss


def _on_device(batch: Tensor, micro_batch: int, engine: Any) -> Iterator[Tensor]:
    if engine.device.type == "cuda":
        batch = batch.pin_memory()  # from pageable memory each copy would wait for all that the GPU has yet to do
    for part in batch.split(micro_batch):
        yield part.to(engine.device, non_blocking=True)


def evaluation_loss(engine: Any, topology: Topology) -> Callable[[Tensor, Tensor], Tensor | None]:
    """(tokens, labels) → their mean loss; None on the stages of a pipeline that do not compute it. Collective."""
    if topology.layout.pipeline == 1:
        return engine
    shape: torch.Size | None = None

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor | None:
        nonlocal shape
        if tokens.shape != shape:  # the engine keeps buffers of the last shape that it saw
            engine.reset_activation_shape()
            shape = tokens.shape
        engine.module.micro_batches = iter([(tokens, labels)])
        losses = engine.eval_batch(iter([(tokens, labels)]), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        return losses[0] if losses else None

    return loss_of
