"""Training tokens per second: our step against a bare loop of the same model, and against other models and quantizers.

    python analysis/benchmarks/step_speed.py [--recipe R] [--compile] [--peers] [--threads N] [--out FILE]

All variants take turns in one process, on the same batch, with the same optimizer. Peers: transformers'
LlamaForCausalLM of the same shapes in the same bare loop, and with torchao's fake quantization in its Linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from measure import Skipped, Variant, interleaved, use_threads
from result import Result, Table, options_of, report
from steppers import BareLoop, Stepper, bare_stepper, batch_of, engine_stepper
from torch import Tensor, nn

from qatscale.config.ds_config import precision_of, run_ds_config
from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import FLOPS_CONVENTION, flops_per_token, peak_flops
from qatscale.engine.runtime import start_runtime
from qatscale.model.hugging_face import hugging_face_config
from qatscale.model.hugging_face_tokenizer import SpecialIds
from qatscale.model.llama import is_norm

OURS, BARE = "qatscale, DeepSpeed engine", "qatscale, bare loop"
ROUNDS = 60
"""Steps: a median is over at least 50."""


def run(*, peers: bool, threads: int | None, quick: bool, recipe: str = "quickstart", compiled: bool = False) -> Result:
    """Two tables, full precision and QAT. compiled: whether our model's blocks are (its peers' are never)."""
    threads = use_threads(threads)
    runtime = start_runtime()
    small = ["batch.sequences=2", "batch.micro_batch=1"] if quick else []
    config = load_run_config(recipe, ["qat.scheme=fused", *small])
    tokens = config.tokens_per_step
    steppers: dict[bool, list[Stepper]] = {}
    skipped: dict[bool, list[Skipped]] = {False: [], True: []}
    for quantized in (False, True):
        of_ours = {"quantized": quantized, "compiled": compiled}
        steppers[quantized] = [
            engine_stepper(OURS, config, runtime, **of_ours),
            bare_stepper(BARE, config, runtime, **of_ours),
        ]
        for found in _peers(config, runtime.device, quantized) if peers else ():
            (skipped[quantized] if isinstance(found, Skipped) else steppers[quantized]).append(found)  # type: ignore[arg-type]
    every = [(quantized, stepper) for quantized in steppers for stepper in steppers[quantized]]
    variants = [Variant(f"{quantized}{stepper.name}", stepper.step, tokens) for quantized, stepper in every]
    seconds = interleaved(variants, 3 if quick else ROUNDS, warmup=2 if quick else 10)
    flops, peak = flops_per_token(config.model, config.data.sequence_length), peak_flops(runtime.device_name)
    tables = []
    for quantized in (False, True):
        named = [Variant(stepper.name, stepper.step, tokens) for stepper in steppers[quantized]]
        times = {stepper.name: seconds[f"{quantized}{stepper.name}"] for stepper in steppers[quantized]}
        of_time = partial(_speed, tokens * flops, peak)
        extra = {name: of_time(values) for name, values in times.items()}
        notes = (f"FLOPs: {FLOPS_CONVENTION}", *([_overhead(seconds)] if quantized else []))
        tables.append(
            Table.of(
                f"{recipe}, {f'QAT at {config.qat.bits:g} bits' if quantized else 'full precision'}: optimizer steps",
                "tokens", named, times, reference=OURS, skipped=skipped[quantized], notes=notes, extra=extra,
            )
        )  # fmt: skip
    for _, stepper in every:
        stepper.close()
    settings = {
        "recipe": recipe, "device": runtime.device_name, "ds_config": config.engine.ds_config, "threads": threads,
        "micro-batch": f"{config.batch.micro_batch} x {config.data.sequence_length}", "tokens a step": tokens,
        "compiled": compiled, "quick": quick,
    }  # fmt: skip
    return Result("step", settings, tables)


def _speed(flops: float, peak: float | None, seconds: list[float]) -> dict[str, float | str]:
    speed = flops / median(seconds)
    return {"GFLOP/s": speed / 1e9, **({"MFU": f"{speed / peak:.1%}"} if peak else {})}


def _overhead(seconds: dict[str, list[float]]) -> str:
    ratios = [qat / fp for qat, fp in zip(seconds[f"True{OURS}"], seconds[f"False{OURS}"], strict=True)]
    return f"QAT runs at {1 / median(ratios):.1%} of full precision's speed ({OURS}, the same rounds)"


def _peers(config: RunConfig, device: torch.device, quantized: bool) -> Iterator[Stepper | Skipped]:
    for name, prepare in (QAT_PEERS if quantized else FP_PEERS).items():
        try:
            yield _transformers(name, config, device, prepare)
        except ImportError as error:
            yield Skipped(name, f"needs {error.name or error}; pip install 'qatscale[peers]'")
        except Exception as error:  # of a peer in this version: reported, and the others are measured
            yield Skipped(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")


def _transformers(
    name: str, config: RunConfig, device: torch.device, prepare: Callable[[nn.Module, int], None]
) -> Stepper:
    """LlamaForCausalLM in the bare loop, with PyTorch's attention, on the very labels that ours gets."""
    from transformers import LlamaForCausalLM

    precision = precision_of(run_ds_config(config))
    theirs = hugging_face_config(config.model, config.data.sequence_length, SpecialIds(None, None), torch.float32)
    theirs._attn_implementation = "sdpa"
    model = LlamaForCausalLM(theirs).to(device).train()
    prepare(model, int(config.qat.bits))
    named = list(model.named_parameters())
    decayed = [p for n, p in named if p.ndim >= 2 and not is_norm(n) and "scale" not in n]
    rest = [p for n, p in named if not any(p is other for other in decayed)]
    groups = [
        {"params": decayed, "lr_ratio": 1.0, "decayed": True},
        {"params": rest, "lr_ratio": 1.0, "decayed": False},
    ]
    loop = BareLoop(model, groups, config, batch_of(config, device), precision)

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss

    return Stepper(name, partial(loop.step, loss_of))


def _as_it_is(model: nn.Module, bits: int) -> None:
    """Full precision."""


def _torchao(model: nn.Module, bits: int, **options: Any) -> None:
    """Fake quantization of the blocks' Linear layers, at the recipe's bits, a scale per output row."""
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, initialize_fake_quantizers
    from torchao.quantization.quant_primitives import TorchAODType

    types = {n: getattr(TorchAODType, f"INT{n}") for n in range(1, 8)}
    weight = IntxFakeQuantizeConfig(types[bits], "per_channel", is_symmetric=True, **options)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name.endswith("_proj"):
                layer = FakeQuantizedLinear.from_linear(child, weight_config=weight)
                initialize_fake_quantizers(layer, (child.weight.detach()[:1],))
                setattr(parent, name, layer)


FP_PEERS: dict[str, Callable[[Any, int], None]] = {"transformers, bare loop": _as_it_is}
QAT_PEERS: dict[str, Callable[[Any, int], None]] = {
    "transformers, torchao dynamic": _torchao,
    "transformers, torchao range learning": partial(_torchao, is_dynamic=False, range_learning=True),
}


def main(given: Sequence[str] | None = None) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--recipe", default="quickstart", help="model, batch and optimizer: a recipe's name or file")
    parser.add_argument("--compile", action="store_true", help="compile the model's blocks, as engine.compile=on")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: OMP_NUM_THREADS, or all cores)")
    options = parser.parse_args(given)
    own = {"recipe": options.recipe, "compiled": options.compile, "threads": options.threads}
    report(run(peers=options.peers, quick=options.quick, **own), options)


if __name__ == "__main__":
    main()
