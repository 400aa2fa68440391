"""Trains the run of a JSON file with a spoiled gradient: SPOIL = {batch index: factor on the gradient, or NaN}.

    python spikes_driver.py RUN.json    {"overrides": […], "spoil": {"8": "nan"}, "passes_over": []}

`passes_over`: batches that the run never reads, as if a rollback had left them out.
"""

import json
import sys
from pathlib import Path

import torch

from qatscale.config.recipe import load_run_config
from qatscale.data.reader import BatchReader
from qatscale.engine import spikes
from qatscale.model.llama import Llama
from qatscale.train.run import train

spikes.WARMUP = 3
run = json.loads(Path(sys.argv[1]).read_text())
spoil = {int(index): float(factor) for index, factor in run["spoil"].items()}
factor = 1.0
own, forward, read = spikes.SpikeState.batch_of, Llama.forward, BatchReader.batch


def batch(self, index, *rest):
    global factor
    factor = spoil.get(index, 1.0)
    return read(self, index, *rest)


def spoiled(self, *arguments):
    loss = forward(self, *arguments)
    return loss + (factor - 1.0) * (loss - loss.detach()) if factor != 1.0 and torch.is_grad_enabled() else loss


def batch_of(self, step):
    step = own(self, step)
    for index in run["passes_over"]:
        step += index <= step
    return step


spikes.SpikeState.batch_of, Llama.forward, BatchReader.batch = batch_of, spoiled, batch
train(load_run_config("debug", run["overrides"]), None)
