"""Compares a model that is split over the processes with the full one, on every process, and names what differs.

python tensor_parallel_driver.py      (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qatscale.config.schema import ModelConfig, QatConfig
from qatscale.engine.compilation import Compilation
from qatscale.model.chunks import chunk_rows
from qatscale.model.head import linear_cross_entropy
from qatscale.model.initial_weights import initialise
from qatscale.model.llama import Llama
from qatscale.model.tensor_parallel import UNSPLIT, TensorParallel, shard_of
from qatscale.quant.plugin import QatPlugin, view
from qatscale.quant.scales import initial_scale
from qatscale.quant.selection import fake_quant_modules

dist.init_process_group("gloo")
RANK, SIZE = dist.get_rank(), dist.get_world_size()
VOCABULARY = 131
"""Odd: the last process has padding."""
TOKENS = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))


class LargestOutput(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error < tolerance, f"rank {RANK}: {what} differs by {error:.1e}"


def check_loss(parallel: TensorParallel) -> None:
    """Vocabulary-parallel cross-entropy against PyTorch's in float64, with large logits that overflow a naive exp."""
    shard = parallel.shard(0, VOCABULARY)
    logits = (30 * torch.randn(3, 8, VOCABULARY, generator=torch.Generator().manual_seed(2))).requires_grad_()
    exact = torch.eye(VOCABULARY)  # the logits as a product, without rounding
    part = shard.take(exact).clone()
    part[shard.size :] = 1e4  # padding takes no part, whatever it holds
    expected = F.cross_entropy(logits.double().flatten(0, 1), LABELS.flatten())
    expected.backward()
    x = logits.detach().clone().requires_grad_()
    loss = linear_cross_entropy(x, part, LABELS, shard)
    (7 * loss).backward()
    close(loss.detach(), expected.detach().float(), "loss", 1e-6)
    assert logits.grad is not None
    assert x.grad is not None
    own = shard.take(logits.grad.movedim(-1, 0)).movedim(0, -1)[..., : shard.size]
    close(x.grad[..., shard.start : shard.start + shard.size], 7 * own, "gradient of the logits")


def check_loss_of_a_product(parallel: TensorParallel) -> None:
    """The loss of several chunks against PyTorch's in float64; padding has no gradient."""
    shard, tokens, width = parallel.shard(0, VOCABULARY), 600, 16
    generator = torch.Generator().manual_seed(4)
    x, table = torch.randn(tokens, width, generator=generator), torch.randn(VOCABULARY, width, generator=generator)
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    wide = [tensor.double().requires_grad_() for tensor in (x, table)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, labels)
    of_x, of_table = torch.autograd.grad(expected, wide)
    x.requires_grad_()
    part = shard.take(table).requires_grad_()
    with LargestOutput() as outputs:
        loss = linear_cross_entropy(x, part, labels, shard)
        loss.backward()
    chunk = chunk_rows(tokens, shard.size, "cpu")
    assert outputs.largest < chunk * VOCABULARY, "the logits of the whole vocabulary are on one process"
    close(loss.detach(), expected.detach().float(), "loss of a product", 1e-6)
    assert part.grad is not None
    close(part.grad, shard.take(of_table).float(), "gradient of the table")
    assert part.grad[shard.size :].count_nonzero() == 0
    assert x.grad is not None
    close(parallel.all_reduce(x.grad.clone()), of_x.float(), "gradient of x, of which each process has a part")


def build(config: ModelConfig, qat: QatConfig, parallel: TensorParallel) -> Llama:
    """Prepared, with its scales as after a switch, in mode `learned`."""
    model = Llama(config, parallel=parallel)
    initialise(model, seed=3)
    QatPlugin(qat, 1).prepare(model)
    for _, layer in fake_quant_modules(model):
        shard = shard_of(layer.weight)
        rows = layer.weight.detach() if shard is None else shard.gather(layer.weight)
        scale, part = initial_scale(layer.quantizer, rows, layer.group_size), shard_of(layer.weight_scale)
        layer.weight_scale.data.copy_(scale if part is None else part.take(scale))
        layer.calibrated, layer.mode = True, "learned"
    return model


def mine(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    shard = shard_of(parameter)
    return whole if shard is None else shard.take(whole)


def check_model(parallel: TensorParallel, *, tied: bool, bits: float, group_size: int | None) -> None:
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=48, layers=2, heads=4, kv_heads=2, intermediate_size=64, tied_embedding=tied
    )
    qat = QatConfig(scheme="fused", bits=bits, group_size=group_size, embedding_bits=4)
    whole, part = build(config, qat, UNSPLIT), build(config, qat, parallel)
    factors = [(a.full_numel, b.full_numel) for (_, a), (_, b) in zip(*map(fake_quant_modules, (whole, part)))]  # noqa: B905
    assert all(a == b for a, b in factors), "g is that of the whole matrix"
    losses = [model(TOKENS, LABELS) for model in (whole, part)]
    close(losses[1].detach(), losses[0].detach(), "loss", 1e-6)
    for loss in losses:
        loss.backward()
    of_whole = dict(whole.named_parameters())
    assert of_whole.keys() == dict(part.named_parameters()).keys()
    for name, parameter in part.named_parameters():
        gradient = of_whole[name].grad
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        assert parameter.grad is not None, name
        close(parameter.grad, mine(gradient, parameter), f"gradient of {name}")
    for ptq_bits in (2, 4):
        with view(whole, "ptq", ptq_bits), view(part, "ptq", ptq_bits), torch.no_grad():
            close(part(TOKENS, LABELS), whole(TOKENS, LABELS), f"loss after PTQ to {ptq_bits} bits", 1e-6)


def check_compiled(parallel: TensorParallel) -> None:
    """The exchanges lie between graphs, and the numbers are the plain ones."""
    config = ModelConfig(vocab_size=VOCABULARY, hidden_size=48, layers=1, heads=4, kv_heads=2, intermediate_size=64)
    plain, compiled = (build(config, QatConfig(scheme="fused", bits=2), parallel) for _ in range(2))
    compilation = Compilation(compiled, "on", "aot_eager")
    losses = [model(TOKENS, LABELS) for model in (plain, compiled)]
    close(losses[1].detach(), losses[0].detach(), "compiled loss", 1e-6)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        close(other.grad, one.grad, f"compiled gradient of {name}")
    assert compilation.news()
    compiled(TOKENS, LABELS)
    assert compilation.news() is None, "the graphs of one step are not those of the next"


for sequence in (False, True):
    split = TensorParallel(RANK, SIZE, dist.group.WORLD, sequence)
    for tied, (bits, group_size) in product((True, False), ((1, None), (2, None), (1.58, 8), (4, None), (6, 8))):
        check_model(split, tied=tied, bits=bits, group_size=group_size)
check_compiled(TensorParallel(RANK, SIZE, dist.group.WORLD))
check_loss(TensorParallel(RANK, SIZE, dist.group.WORLD))
check_loss_of_a_product(TensorParallel(RANK, SIZE, dist.group.WORLD))
dist.destroy_process_group()
print("RANK", os.environ["RANK"], "ok")
