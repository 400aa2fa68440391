"""What only GPUs run, without one: on the meta device, on fake CUDA tensors, and in fake groups of 1,024 processes.

What this cannot show is listed in analysis/benchmarks/gpu/README.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig
from qatscale.errors import UserError
from qatscale.model.chunks import chunk_rows
from qatscale.model.llama import Llama
from qatscale.quant.fake_quantize import try_kernels
from qatscale.quant.plugin import QatPlugin
from qatscale.quant.selection import fake_quant_modules


class Operations(TorchDispatchMode):
    """Counts operations, and the most rows of an output whose last dimension is `width`."""

    def __init__(self, width: int = 0) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.shape[:-1].numel())
        return out


def quantized(config: RunConfig) -> tuple[Llama, QatPlugin]:
    """On the meta device, in bf16, behind its switch."""
    with torch.device("meta"):
        model = Llama(config.model, config.engine.activation_checkpointing)
        plugin = QatPlugin(config.qat, 1)
        plugin.prepare(model)
    for _, layer in fake_quant_modules(model):
        layer.calibrated, layer.mode = True, "learned"
    return model.to(torch.bfloat16), plugin


@pytest.mark.parametrize("recipe", ["86m", "8b"])
def test_a_step_in_the_sizes_of_a_gpu_never_waits_for_the_device(recipe: str) -> None:
    """Forward, backward and AdamW of a full recipe: a number that the host read would be an error on the meta device.

    The logits of all tokens are never in memory.
    """
    config = load_run_config(recipe, ["qat.scheme=scratch", "qat.bits=2"])
    model, plugin = quantized(config)
    tokens = torch.empty(config.batch.micro_batch, config.data.sequence_length, dtype=torch.long, device="meta")
    with Operations(config.model.vocab_size) as seen:
        loss = model(tokens, tokens)
        loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in model.parameters())
    rows = chunk_rows(tokens.numel(), config.model.vocab_size, "cuda")
    assert seen.rows == max(rows, config.model.hidden_size), "transposed, the table is [hidden size, vocabulary]"
    assert rows < tokens.numel(), "the example"
    torch.optim.AdamW(plugin.optimizer_groups(), lr=1e-3, foreach=True).step()


def test_on_cuda_weights_pass_the_kernels_and_attention_its_fused_form() -> None:
    """Forward only: a torch without CUDA differentiates no CUDA tensor, not even a fake one."""
    config = load_run_config("86m", ["qat.scheme=scratch", "qat.bits=2", "model.layers=3"])
    model, _ = quantized(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.requires_grad_(False).to_empty(device="cuda")
        tokens = torch.empty(2, 64, dtype=torch.long, device="cuda")
        with Operations() as seen:
            logits = model(tokens)
        assert (logits.device.type, logits.shape) == ("cuda", (2, 64, 32_000))
        layers = [layer for _, layer in fake_quant_modules(model)]
        assert seen.counts["qatscale.quantize.default"] == len(layers) == 3 * 7 + 2
        weight, scale = layers[0].weight, layers[0].weight_scale
        both = torch.ops.qatscale.gradients.default(weight, weight, scale, "2", 1.0)
        assert [(g.shape, g.dtype, g.device) for g in both] == [(p.shape, p.dtype, p.device) for p in (weight, scale)]
    reads = [name for name in seen.counts if "_local_scalar_dense" in name or "item" in name]
    assert reads == []


def test_a_gpu_that_compiles_no_kernel_is_refused_at_the_start() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="C compiler and Python's headers"):
            try_kernels(torch.device("cuda"))
    with FakeTensorMode(), Operations() as seen:
        try_kernels(torch.device("cuda"))
    assert seen.counts["qatscale.quantize.default"] == 1


FAKE_GROUPS = """
import os, sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from qatscale.config.ds_config import load_ds_config, merge_ds_config
from qatscale.config.recipe import load_run_config
from qatscale.engine.layout_plan import plan_layout
from qatscale.engine.runtime import Runtime, _import_deepspeed_quietly
from qatscale.engine.topology import Topology
from qatscale.model.initial_weights import InitialWeights
from qatscale.model.llama import canonical_name
from qatscale.train.setup import assemble
_import_deepspeed_quietly()
import deepspeed, deepspeed.comm.comm as comm

def join(processes, rank):
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    comm.cdb = None
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return Runtime(rank, processes, torch.device("cpu"))

def peers(group):
    return dist.get_process_group_ranks(group)

for processes, tensor, pipeline in ((64, 2, 1), (64, 8, 4), (1024, 8, 8), (1024, 8, 1)):
    ds = load_ds_config("zero1_bf16")
    config = load_run_config("8b", [f"engine.tensor_parallel={tensor}", f"engine.pipeline_stages={pipeline}"])
    data = processes // tensor // pipeline
    for rank in (0, processes // 2 + 5, processes - 1):
        topology = Topology(config, plan_layout(config, ds, processes), join(processes, rank))
        first = rank // tensor * tensor
        assert peers(topology.tensor.group) == list(range(first, first + tensor)), "neighbours"
        stage = rank // (tensor * data)
        expected = [stage * tensor * data + i * tensor + rank % tensor for i in range(data)]
        assert peers(topology.grid.get_data_parallel_group()) == expected
        assert topology.place == (stage, rank // tensor % data, rank % tensor)

runtime = join(1024, 1000)
config = load_run_config("debug", ["tokens=1M", "batch.sequences=1024", "batch.micro_batch=1", "model.hidden_size=256"])
for stage in ("zero1_fp32", "zero3_fp32"):
    ds = load_ds_config(stage)
    ds["zero_optimization"] |= {"reduce_bucket_size": 1000}
    layout = plan_layout(config, ds, 1024)
    built = assemble(config, layout, merge_ds_config(config, ds, layout.data), runtime, 2)
    held = sum(fragment.numel for fragment in built.masters.fragments)
    every = sum(shape.numel() for shape in built.masters.shapes.values())
    assert held <= every / 1024 + len(built.masters.shapes) + 2048, (held, every)
weights = InitialWeights(config.model, config.seed)
for fragment in built.masters.fragments:  # of ZeRO-3: drawn here, from the middle of rows
    full = torch.zeros(built.masters.shapes[fragment.name])
    weights.fill(full, fragment.name)
    assert torch.equal(fragment.of(fragment.partition), fragment.of_full(full)), fragment.name
print("ok")
"""


def test_layouts_groups_and_shares_of_1024_processes() -> None:
    """One process of them, with torch's fake process group for the others."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", FAKE_GROUPS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("ok\n")
