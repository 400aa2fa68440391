"""Validation loss of one set of weights in several views: full precision, quantized, post-training quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qatscale.data.reader import EvaluationReader
from qatscale.engine.step import evaluation_loss
from qatscale.engine.topology import Topology
from qatscale.quant.views import view


def ptq_view(bits: float) -> str:
    """The name of a post-training-quantized view, such as ptq2 or ptq1.58."""
    return f"ptq{bits:g}"


def open_view(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """A context in which `model` computes in this view: `fp`, `quantized`, `ptq2` …; `current` = as it is."""
    if name == "current":
        return nullcontext()
    if name.startswith("ptq"):
        return view(model, "ptq", float(name.removeprefix("ptq")))
    return view(model, name)  # type: ignore[arg-type]  # refuses what it does not know


def validation_losses(
    engine: Any,
    views: Iterable[str],
    reader: EvaluationReader,
    topology: Topology,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """View → mean loss in nats over the held-out tokens, on all processes of a DeepSpeed engine. Collective.

    before_batch: called before each batch, equally often on all processes.
    """
    engine.eval()
    loss_of = evaluation_loss(engine, topology)
    losses = {}
    for name in views:
        with open_view(engine.module, name):
            total, tokens = summed_loss(
                loss_of, reader, engine.device, topology.place.data, topology.layout.data, before_batch
            )
        sums = torch.tensor([total, tokens], dtype=torch.float64, device=engine.device)
        if topology.layout.processes > 1:
            dist.all_reduce(sums)  # each model's processes saw the same tokens, equally often: the mean stays
        losses[name] = float(sums[0] / sums[1])
    engine.train()
    return losses


@torch.no_grad()
def summed_loss(
    loss_of: Callable[[Tensor, Tensor], Tensor | None],
    reader: EvaluationReader,
    device: torch.device,
    rank: int,
    ranks: int,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """(sum of the losses of all predicted tokens, their number) over this process's share of the held-out sequences.

    (0, 0) where `loss_of` gives none: on the stages of a pipeline before the last.
    """
    total, count = 0.0, 0
    for index in range(reader.batches_per_rank(ranks)):
        before_batch()
        batch = reader.batch(index, rank, ranks)
        tokens = torch.from_numpy(batch.tokens).to(device)
        loss = loss_of(tokens[:, :-1], tokens[:, 1:])  # also for a filler of weight 0: ZeRO-3 gathers from everyone
        if loss is None:
            continue
        total += float(loss) * batch.weight * reader.sequence_length
        count += batch.weight * reader.sequence_length
    return total, count
