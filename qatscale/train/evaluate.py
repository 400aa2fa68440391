"""Validation loss of one set of weights in several views: full precision, quantized, post-training quantized."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qatscale.config import load_ds_config, load_run_config, precision_of
from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Split
from qatscale.data.reader import EvaluationReader, TokenStream
from qatscale.engine.checkpoints.files import CheckpointReader, find_checkpoint, recipe_beside, verify_files
from qatscale.engine.runtime import uses_gpu
from qatscale.engine.step import evaluation_loss
from qatscale.engine.topology import Topology
from qatscale.errors import UserError
from qatscale.model.llama import Llama
from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.plugin import QatPlugin
from qatscale.quant.views import view
from qatscale.timeline import build_timeline


def ptq_view(bits: float) -> str:
    """The name of a post-training-quantized view: ptq2, ptq1.58."""
    return f"ptq{bits:g}"


def open_view(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """A context in which `model` computes in this view: `fp`, `quantized`, `ptq2` …; `current` = as it is."""
    if name == "current":
        return nullcontext()
    if name.startswith("ptq"):
        return view(model, "ptq", float(name.removeprefix("ptq")))
    return view(model, name)  # type: ignore[arg-type]  # refuses what it does not know


def validation_losses(
    engine: Any, views: Iterable[str], reader: EvaluationReader, topology: Topology
) -> dict[str, float]:
    """View → mean loss in nats over the held-out tokens, on all processes of a DeepSpeed engine. Collective."""
    engine.eval()
    loss_of = evaluation_loss(engine, topology)
    losses = {}
    for name in views:
        with open_view(engine.module, name):
            total, tokens = summed_loss(loss_of, reader, engine.device, topology.data_rank, topology.data_ranks)
        sums = torch.tensor([total, tokens], dtype=torch.float64, device=engine.device)
        if topology.layout.processes > 1:
            dist.all_reduce(sums)  # processes that saw the same tokens count alike: the mean is what it is
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
) -> tuple[float, int]:
    """(sum of the losses of all predicted tokens, their number) over this process's share of the held-out sequences.

    (0, 0) where `loss_of` gives none: on the stages of a pipeline before the last.
    """
    total, count = 0.0, 0
    for index in range(reader.batches_per_rank(ranks)):
        batch = reader.batch(index, rank, ranks)
        tokens = torch.from_numpy(batch.tokens).to(device)
        loss = loss_of(tokens[:, :-1], tokens[:, 1:])  # also for a filler of weight 0: ZeRO-3 gathers from everyone
        if loss is None:
            continue
        total += float(loss) * batch.weight * reader.sequence_length
        count += batch.weight * reader.sequence_length
    return total, count


def open_validation(config: RunConfig) -> EvaluationReader:
    """The held-out batches of a run. UserError for data that is missing, damaged or not of this model."""
    held_out = open_stream(config, "validation")
    return EvaluationReader(held_out, config.data.sequence_length, config.evaluation.tokens, config.batch.micro_batch)


def open_stream(config: RunConfig, split: Split) -> TokenStream:
    """A split of the run's data, its checksums and its vocabulary checked. One process reads the bytes, all look at the
    sizes: a job of many processes that reads the whole corpus once each would spend its first minutes on it."""
    if config.data.path is None:
        do = "Prepare some, `qatscale prepare SOURCE --out DIR`, and set data.path=DIR."
        raise UserError("data.path", None, "no data is given.", do)
    is_main = int(os.environ.get("RANK", 0)) == 0  # before there is a process group
    stream = TokenStream.open(config.data.path, split, verify="auto" if is_main else "size")
    stream.manifest.check_vocabulary(config.model.vocab_size)
    return stream


@torch.no_grad()
def load_checkpointed_model(checkpoint: Path, config: RunConfig, device: torch.device) -> tuple[Llama, QatPlugin]:
    """The model of a checkpoint of any layout, on one process, in the precision that training's forward used."""
    reader = CheckpointReader(checkpoint)
    verify_files(checkpoint, reader.manifest)
    model = Llama(config.model)
    timeline = build_timeline(config)
    plugin = QatPlugin(config.qat, timeline.switch_step)
    plugin.prepare(model)
    model.load_state_dict(reader.weights(), strict=False)  # tied weights are there once; names were checked on saving
    plugin.load_state(reader.manifest.plugin)
    if precision_of(load_ds_config(config.engine.ds_config)) == "bf16":
        model.to(torch.bfloat16)  # scales and weights as the forward pass saw them
    return model.to(device), plugin


def evaluate_checkpoint(
    what: str, ptq_bits: Iterable[float] = (), data: Path | None = None, tokens: int | None = None
) -> tuple[Path, int, dict[str, float]]:
    """Evaluate a checkpoint, named as `find_checkpoint` takes it, on the held-out data of its run or on `data`.

    Returns the checkpoint's folder, the number of predicted tokens, and view → loss: `fp`, `quantized` where it has
    switched, and `ptqB` for each of `ptq_bits`.
    """
    checkpoint = find_checkpoint(what)
    recipe = recipe_beside(checkpoint, what)
    overrides = [f"data.path={data}"] if data else []
    overrides += [f"evaluation.tokens={tokens}"] if tokens is not None else []
    config = load_run_config(recipe, overrides)
    for bits in ptq_bits:
        get_quantizer(bits)  # refuses a width there is none for, before anything is loaded
    reader = open_validation(config)
    device = torch.device("cuda" if uses_gpu() else "cpu")
    model, plugin = load_checkpointed_model(checkpoint, config, device)
    views = ["fp", *(["quantized"] if plugin.switched_at is not None else []), *map(ptq_view, ptq_bits)]
    losses, counted = {}, 0
    for name in views:
        with open_view(model, name):
            total, counted = summed_loss(model, reader, device, 0, 1)
        losses[name] = total / counted
    return checkpoint, counted, losses
