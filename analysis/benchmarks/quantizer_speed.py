"""A Linear layer with fake-quantized weights against a plain one: forward and backward, on the CPU or the GPU.

    python analysis/benchmarks/quantizer_speed.py [--peers] [--threads N] [--out FILE]        see quantizer_speed.md

Peers: torchao 0.18's QAT layer with dynamic scales and with learned ones, ParetoQ's released layer (in torchao 0.18.0),
and NVIDIA ModelOpt's weight quantizer. Each as its project has it, at 4 bits with a scale per output row.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

import torch
from measure import Skipped, Variant, interleaved, use_threads
from result import Result, Table, options_of, report
from torch import Tensor, nn
from torch.nn import functional as F

from qatscale.quant import reference
from qatscale.quant.layers import FakeQuantLinear
from qatscale.quant.scales import initial_scale

PLAIN = "plain Linear"
WIDTHS = (1, 1.58, 2, 4)
CASES = (("fp32", 256, 50), ("bf16", 256, 50), ("fp32", 2048, 16))
"""(precision, tokens, rounds)."""
BITS = 4
"""The peers' bit width; ParetoQ also at 2, its other arithmetic."""


def run(*, peers: bool, threads: int | None, quick: bool) -> Result:
    """Tables of time over a plain Linear's, one per case."""
    threads = use_threads(threads)
    channels = 64 if quick else 1024
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tables = []
    for precision, tokens, rounds in CASES[:2] if quick else CASES:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        step = partial(_step, tokens=tokens, channels=channels, dtype=dtype, device=device)
        variants = [Variant(PLAIN, step(_plain), tokens)]
        variants += [Variant(f"qatscale, {bits:g} bits", step(partial(_ours, bits=bits)), tokens) for bits in WIDTHS]
        variants.append(Variant("qatscale, plain arithmetic, 4 bits", step(_reference), tokens))
        skipped: list[Skipped] = []
        if quick:
            skipped.append(Skipped("torch.compile", "takes half a minute, and this is --quick"))
        elif why := _no_compiler(device):
            skipped.append(Skipped("torch.compile", why))
        else:
            torch._dynamo.reset()  # else the shapes of several tables would become one dynamic one
            variants.append(Variant("plain Linear, compiled", step(partial(_compiled, make=_plain)), tokens))
            for bits in (2, BITS):
                make = partial(_compiled, make=partial(_ours, bits=bits))
                variants.append(Variant(f"qatscale, {bits} bits, compiled", step(make), tokens))
        for name, layer_or_why in _peers(dtype) if peers else ():
            if isinstance(layer_or_why, Skipped):
                skipped.append(layer_or_why)
            else:
                variants.append(Variant(name, step(layer_or_why), tokens))
        tables.append(
            Table.of(
                f"Linear {channels} -> {channels}, {precision}, {tokens:,} tokens: forward and backward",
                "tokens",
                variants,
                interleaved(variants, 3 if quick else rounds),
                reference=PLAIN,
                skipped=skipped,
            )
        )
    settings = {"device": device, "threads": threads, "channels": channels, "quick": quick}
    return Result("quantizer", settings, tables)


def _step(
    make: Callable[[nn.Linear], nn.Module], *, tokens: int, channels: int, dtype: Any, device: str
) -> Callable[[], None]:
    """Forward and backward of one layer, gradients of the weight, its scale and the input, which are new each time."""
    torch.manual_seed(0)
    linear = nn.Linear(channels, channels, bias=False, device=device, dtype=dtype)
    layer = make(linear)
    leaves = [*layer.parameters()]
    x = torch.randn(tokens, channels, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, channels, device=device, dtype=dtype)

    def step() -> None:
        for leaf in (x, *leaves):
            leaf.grad = None
        layer(x).backward(grad)

    step()
    assert x.grad is not None
    assert linear.weight.grad is not None, "the layer trains its weight"
    return step


def _plain(linear: nn.Linear) -> nn.Linear:
    return linear


def _ours(linear: nn.Linear, bits: float) -> FakeQuantLinear:
    layer = FakeQuantLinear.convert(linear, bits)
    with torch.no_grad():
        layer.weight_scale.data = initial_scale(layer.quantizer, layer.weight).to(layer.weight.dtype)
    layer.mode = "learned"
    return layer


def _compiled(linear: nn.Linear, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """As in a block that torch.compile has compiled: on CPU its compiler fuses the quantizer's arithmetic."""
    layer: Any = make(linear)
    layer.compile()
    return layer


def _no_compiler(device: str) -> str | None:
    """Why torch.compile cannot work here; None: it can."""
    if device == "cuda" or shutil.which(os.environ.get("CXX", "g++")):
        return None
    return "needs a C++ compiler"


def _reference(linear: nn.Linear) -> nn.Module:
    """The plain tensor arithmetic that the fast way is held against, in the same place."""
    layer: Any = _ours(linear, BITS)
    function = _autograd_function(
        partial(reference.quantize, layer.quantizer), partial(reference.gradients, layer.quantizer)
    )
    layer.forward = lambda x: F.linear(x, function(layer.weight, layer.weight_scale, layer.grad_factor))
    return layer


def _autograd_function(quantize: Any, gradients: Any) -> Any:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor, alpha: Tensor, grad_factor: float) -> Tensor:
            ctx.save_for_backward(w, alpha)
            ctx.grad_factor = grad_factor
            return quantize(w, alpha)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return *gradients(grads[0], *ctx.saved_tensors, ctx.grad_factor), None

    return Function.apply


def _peers(dtype: Any) -> Iterator[tuple[str, Any]]:
    """(name, how a Linear becomes a layer of theirs), or (name, Skipped)."""
    for name, (package, make) in PEERS.items():
        try:
            with _quiet():
                layer = make(nn.Linear(64, 64, bias=False, dtype=dtype))
                layer(torch.randn(2, 64, dtype=dtype)).sum().backward()
        except ImportError as error:
            yield name, Skipped(name, f"needs {package} ({error})")
        except Exception as error:  # of a peer in this version: reported, and the others are measured
            yield name, Skipped(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        else:
            yield name, make


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what peers print and warn of when they are imported and applied."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _torchao(linear: nn.Linear, **options: Any) -> nn.Module:
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, initialize_fake_quantizers
    from torchao.quantization.quant_primitives import TorchAODType

    config = IntxFakeQuantizeConfig(TorchAODType.INT4, "per_channel", is_symmetric=True, **options)
    layer = FakeQuantizedLinear.from_linear(linear, weight_config=config)
    initialize_fake_quantizers(layer, (linear.weight.detach()[:1],))
    return layer


def _paretoq(linear: nn.Linear, bits: int) -> nn.Module:
    """Scales as its training script makes them: max|w| at 2 bits, max|w|/Qp at 4."""
    from torchao.prototype.paretoq.models.utils_quant import QuantizeLinear

    layer = QuantizeLinear(linear.in_features, linear.out_features, w_bits=bits).to(linear.weight)
    layer.weight = linear.weight
    largest = linear.weight.detach().abs().amax(-1, keepdim=True)
    layer.weight_clip_val.data = largest / (7 if bits == 4 else 1)
    return layer


def _modelopt(linear: nn.Linear) -> nn.Module:
    import modelopt.torch.quantization as mtq

    wanted = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}, "enable": True},
    ]
    config = {"quant_cfg": wanted, "algorithm": "max"}
    layer = nn.Sequential(linear)
    return mtq.quantize(layer, config, lambda model: model(linear.weight.detach()[:1]))


PEERS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    "torchao, dynamic": ("torchao==0.18.0", _torchao),
    "torchao, range learning": ("torchao==0.18.0", partial(_torchao, is_dynamic=False, range_learning=True)),
    "ParetoQ as released, 4 bits": ("torchao==0.18.0", partial(_paretoq, bits=4)),
    "ParetoQ as released, 2 bits": ("torchao==0.18.0", partial(_paretoq, bits=2)),
    "ModelOpt": ("nvidia-modelopt", _modelopt),
}
"""Name -> (what to install, how a Linear becomes a layer of theirs)."""


def main(given: Sequence[str] | None = None) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: OMP_NUM_THREADS, or all cores)")
    options = parser.parse_args(given)
    report(run(peers=options.peers, threads=options.threads, quick=options.quick), options)


if __name__ == "__main__":
    main()
