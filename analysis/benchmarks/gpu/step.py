"""How fast is a training step on this GPU? The DeepSpeed step against a bare PyTorch loop, per model size.

    python analysis/benchmarks/gpu/step.py --device cuda --out DIR [--recipes 86m,396m] [--parts step,parts]
    python analysis/benchmarks/gpu/step.py --device cpu --out DIR        toy sizes: a test of this script

Part `step`: for each recipe full precision and QAT, plain and compiled, through the engine under ZeRO-1 in bf16 and in
a bare loop of the same model: tokens/s, MFU (by the record's convention), peak memory; checked against targets.
Part `parts`: attention backends, forms of the loss, AdamW. The gradient accumulation of a recipe is left out: one
micro-batch a step, so that the optimizer's share is the largest that a run can have, and MFU the least.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from record import Record, about_here, require

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis"), str(ROOT / "analysis" / "benchmarks")]

MFU = {"86m": 0.38, "396m": 0.45, "759m": 0.48, "2p2b": 0.50, "8b": 0.41}
"""Targets of the compiled full-precision step."""
AGAINST_BARE = 0.95
QAT = {"86m": 0.96}
QAT_OTHERS = 0.98
"""Share of full precision's speed, at 16,384 tokens and more in a micro-batch."""
LEAST_TOKENS = 16_384
MICRO_BATCHES = {"86m": 16, "396m": 8, "759m": 8, "2p2b": 4, "8b": 4}
LAYERS = {"8b": 8}
"""8B parameters take 145 GB of weights, gradients and Adam's state: a quarter of the layers, same width, is run. Their
share of the embedding and the head is larger than in the whole model, and the MFU says so by its own count."""
RECOMPUTED = ("2p2b", "8b")
STEPS, WARMUP = 50, 10


class Job:
    def __init__(self, device: str, record: Record) -> None:
        from qatscale.engine.runtime import start_runtime

        self.device, self.record = device, record
        self.runtime = start_runtime()
        self.speeds: dict[tuple[str, bool, bool, str], float] = {}

    def config(self, recipe: str) -> Any:
        from qatscale.config.recipe import load_run_config

        micro = MICRO_BATCHES[recipe]
        more = [f"batch.micro_batch={micro}", f"batch.sequences={micro}", "engine.ds_config=zero1_bf16"]
        if self.device == "cpu":
            more = ["model.hidden_size=64", "model.layers=2", "model.heads=4", "model.intermediate_size=128",
                    "model.vocab_size=256", "data.sequence_length=32", "batch.micro_batch=2", "batch.sequences=2",
                    "model.kv_heads=null", "engine.ds_config=zero1_bf16"]  # fmt: skip
        elif recipe in LAYERS:
            more.append(f"model.layers={LAYERS[recipe]}")
        more.append(f"engine.activation_checkpointing={'true' if recipe in RECOMPUTED else 'false'}")
        return load_run_config(recipe, [*more, "qat.scheme=fused"])

    def measure(self, recipe: str, kind: str, quantized: bool, compiled: bool) -> Mapping[str, Any]:
        """Median and quartiles over STEPS steps behind WARMUP, each waited for; the first ones compile."""
        import torch
        from steppers import bare_stepper, engine_stepper

        from qatscale.config.sizes import flops_per_token, peak_flops

        config = self.config(recipe)
        make = {"engine": engine_stepper, "bare": bare_stepper}[kind]
        self._reset()
        began = time.perf_counter()
        stepper = make(kind, config, self.runtime, quantized=quantized, compiled=compiled)
        loss = float(stepper.step())
        first = time.perf_counter() - began
        steps, warmup = (STEPS, WARMUP) if self.device == "cuda" else (3, 1)
        seconds = timed(stepper.step, steps, warmup, self.device)
        stepper.close()
        tokens = config.tokens_per_step
        speed = tokens / median(seconds)
        quarter = len(seconds) // 4
        peak = peak_flops(self.runtime.device_name)
        flops = speed * flops_per_token(config.model, config.data.sequence_length)
        numbers = {
            "tokens/s": speed, "quartiles": f"{tokens / seconds[-1 - quarter]:.5g} to {tokens / seconds[quarter]:.5g}",
            "TFLOP/s": flops / 1e12, "MFU": flops / peak if peak else "unknown peak", "first step s": first,
            "tokens a micro-batch": config.batch.micro_batch * config.data.sequence_length, "loss": loss,
        }  # fmt: skip
        if self.device == "cuda":
            numbers["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        self.speeds[recipe, quantized, compiled, kind] = speed
        stepper.step = lambda: None  # type: ignore[assignment, return-value]  # let go of the model
        return require(loss == loss, "the loss is not a number", numbers)

    def _reset(self) -> None:
        import torch

        gc.collect()
        torch._dynamo.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def steps(self, recipe: str) -> None:
        shown = f"{recipe}{f', {LAYERS[recipe]} layers' if recipe in LAYERS and self.device == 'cuda' else ''}"
        for compiled in (True, False):
            for kind in ("engine", "bare") if compiled else ("engine",):
                for quantized in (False, True):
                    name = f"{shown}: {kind}, {'QAT' if quantized else 'full precision'}{', compiled' * compiled}"
                    self.record.check(name, partial(self.measure, recipe, kind, quantized, compiled))
        self.record.check(f"{shown}: targets", partial(self.targets, recipe))

    def targets(self, recipe: str) -> Mapping[str, Any]:
        """Of the compiled step. Not on CPU, where the sizes are toys."""
        from qatscale.config.sizes import flops_per_token, peak_flops

        config = self.config(recipe)
        fp, qat = (self.speeds[recipe, quantized, True, "engine"] for quantized in (False, True))
        bare = self.speeds[recipe, False, True, "bare"]
        numbers: dict[str, Any] = {"engine over bare": fp / bare, "QAT over full precision": qat / fp}
        if self.device == "cpu":
            return numbers
        peak = peak_flops(self.runtime.device_name)
        wrong = [] if fp / bare >= AGAINST_BARE else [f"less than {AGAINST_BARE} of the bare loop"]
        least = QAT.get(recipe, QAT_OTHERS)
        if config.tokens_per_step >= LEAST_TOKENS and qat / fp < least:
            wrong.append(f"QAT below {least} of full precision")
        if peak:
            numbers["MFU"] = fp * flops_per_token(config.model, config.data.sequence_length) / peak
            numbers["MFU wanted"] = MFU[recipe]
            wrong += [] if numbers["MFU"] >= MFU[recipe] else ["MFU below its target"]
        return require(not wrong, "; ".join(wrong), numbers)

    # --- parts of a step ---

    def parts(self) -> None:
        self.record.check(
            "attention backends: bf16, causal, 4 x 12 heads x 2,048 x 64 (grouped: 3 of 12)", self.attention
        )
        self.record.check("head and loss: 86m's, forward and backward", self.losses)
        self.record.check("AdamW on 86m's parameters", self.adamw)

    def attention(self) -> Mapping[str, Any]:
        """Milliseconds of forward + backward by backend, and what PyTorch picks by itself ('default')."""
        import torch
        from torch.nn import functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        b, t = (4, 2048) if self.device == "cuda" else (1, 32)
        numbers: dict[str, Any] = {}
        for grouped in (False, True):
            shapes = [(b, 12, t, 64)] + [(b, 3 if grouped else 12, t, 64)] * 2
            q, k, v = (torch.randn(s, device=self.device, dtype=torch.bfloat16, requires_grad=True) for s in shapes)

            def run(q: Any = q, k: Any = k, v: Any = v, grouped: bool = grouped) -> None:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
                out.sum().backward()

            backends = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
            for name, backend in backends.items():
                key = f"{name}{', grouped' * grouped} ms"
                try:
                    if backend is None:
                        numbers[key] = self.milliseconds(run)
                        continue
                    with sdpa_kernel(backend):
                        numbers[key] = self.milliseconds(run)
                except RuntimeError as error:
                    numbers[key] = f"not available: {str(error).splitlines()[0][:80]}"
        return numbers

    def losses(self) -> Mapping[str, Any]:
        """Milliseconds and peak MiB above what is held: PyTorch's on whole fp32 logits, ours plain and compiled,
        Liger's where it is installed."""
        import torch
        from torch.nn import functional as F

        from qatscale.model.head import fusible_chunk_loss, linear_cross_entropy

        n, v, d = (32_768, 32_000, 768) if self.device == "cuda" else (600, 512, 64)
        x = torch.randn(n, d, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        weight = (0.02 * torch.randn(v, d, device=self.device)).to(torch.bfloat16).requires_grad_()
        labels = torch.randint(v, (n,), device=self.device)
        fused = torch.compile(fusible_chunk_loss, dynamic=False)
        variants: dict[str, Callable[[], Any]] = {
            "whole fp32 logits": lambda: F.cross_entropy(F.linear(x, weight).float(), labels),
            "chunks": lambda: linear_cross_entropy(x, weight, labels),
            "chunks, compiled": lambda: linear_cross_entropy(x, weight, labels, chunk=fused),
        }
        if self.device == "cpu":
            del variants["chunks, compiled"]
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            variants["Liger"] = lambda: liger(weight, x, labels)
        except ImportError:
            pass
        numbers: dict[str, Any] = {}
        found = {}
        for name, loss_of in variants.items():
            self._reset()
            held = torch.cuda.memory_allocated() if self.device == "cuda" else 0
            numbers[f"{name} ms"] = self.milliseconds(lambda loss_of=loss_of: loss_of().backward())
            if self.device == "cuda":
                numbers[f"{name} MiB"] = (torch.cuda.max_memory_allocated() - held) / 2**20
            x.grad = weight.grad = None
            loss_of().backward()
            assert x.grad is not None
            found[name] = x.grad.float()
            x.grad = weight.grad = None
        expected = found["whole fp32 logits"]
        errors = {f"{name} error": float((g - expected).norm() / expected.norm()) for name, g in found.items()}
        return require(max(errors.values()) < 2e-2, "gradients part", {**numbers, **errors})

    def adamw(self) -> Mapping[str, Any]:
        import torch

        count = 85_930_752 if self.device == "cuda" else 10_000
        numbers = {}
        for name, options in {"fused": {"fused": True}, "foreach": {"foreach": True}}.items():
            parameter = torch.nn.Parameter(torch.zeros(count, device=self.device))
            parameter.grad = torch.ones_like(parameter)
            numbers[f"{name} ms"] = self.milliseconds(torch.optim.AdamW([parameter], **options).step)
        return numbers

    def milliseconds(self, run: Callable[[], Any]) -> float:
        return 1e3 * median(
            timed(run, 30 if self.device == "cuda" else 2, 5 if self.device == "cuda" else 1, self.device)
        )


def timed(run: Callable[[], Any], count: int, warmup: int, device: str) -> list[float]:
    """Seconds of each call, sorted, the device waited for."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for index in range(warmup + count):
        wait()
        began = time.perf_counter()
        run()
        wait()
        if index >= warmup:
            seconds.append(time.perf_counter() - began)
    return sorted(seconds)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=["86m", "396m"])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["parts", "step"])
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--commit")
    options = parser.parse_args(given)
    for name in options.recipes:
        if name not in MFU:
            parser.error(f"--recipes {name}: of {', '.join(MFU)}")
    return options


def main() -> int:
    import os

    options = arguments()
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    from qatscale.config.sizes import FLOPS_CONVENTION

    about = about_here(options.device, options.commit) | {"FLOPs": FLOPS_CONVENTION}
    record = Record(options.out, "step", "The training step, against a bare loop", about, options.seconds)
    job = Job(options.device, record)
    if "parts" in options.parts:
        job.parts()
    if "step" in options.parts:
        for recipe in options.recipes:
            job.steps(recipe)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
