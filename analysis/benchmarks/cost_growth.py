"""How the cost of a training step grows: tokens/s over model size, micro-batch and sequence length, and what QAT adds.

    python analysis/benchmarks/cost_growth.py --out DIR [--device cuda] [--threads 2] [--quick]

Every point is a full-precision and a QAT step of the DeepSpeed engine (ZeRO-1; fp32 on a CPU, bf16 on a GPU), in turns,
with one micro-batch a step, where QAT costs the most. Writes DIR/cost_growth.json and DIR/cost_growth.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]

CPU = {"widths": (64, 128, 256), "micros": (1, 2, 4, 8, 16), "lengths": (64, 128, 256, 512), "base": (128, 4, 128)}
CUDA = {"widths": (768, 1280, 1536, 2560), "micros": (1, 2, 4, 8, 16), "lengths": (512, 1024, 2048, 4096),
        "base": (768, 8, 2048)}  # fmt: skip
QUICK = {"widths": (32,), "micros": (1, 2), "lengths": (32,), "base": (32, 1, 32)}


@dataclass(frozen=True)
class Point:
    axis: str
    parameters: int
    micro_batch: int
    length: int
    fp: float
    """Tokens/s."""
    qat: float
    overhead: float
    """Median of (seconds of QAT / seconds of full precision) - 1 of the same rounds."""

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.length


def places(sizes: dict[str, Any]) -> Iterator[tuple[str, int, int, int]]:
    """(axis, width, micro-batch, length): one grows, the others stay at the base."""
    width, micro, length = sizes["base"]
    yield from (("parameters", w, micro, length) for w in sizes["widths"])
    yield from (("micro-batch", width, m, length) for m in sizes["micros"])
    yield from (("sequence length", width, micro, t) for t in sizes["lengths"])


def measure(axis: str, width: int, micro: int, length: int, bits: int, rounds: int, on_gpu: bool) -> Point:
    from measure import Variant, interleaved
    from steppers import engine_stepper

    from qatscale.config.recipe import load_run_config
    from qatscale.config.sizes import count_parameters
    from qatscale.engine.runtime import start_runtime

    layers = 8 if on_gpu else 4
    config = load_run_config("quickstart", [
        f"model.hidden_size={width}", f"model.intermediate_size={3 * width}", f"model.layers={layers}",
        f"model.heads={max(2, width // 64)}", f"model.vocab_size={32_000 if on_gpu else 1024}",
        f"data.sequence_length={length}", f"batch.micro_batch={micro}", f"batch.sequences={micro}",
        "model.kv_heads=null", "qat.embedding_bits=auto", f"qat.bits={bits}",
        f"engine.ds_config=zero1_{'bf16' if on_gpu else 'fp32'}",
    ])  # fmt: skip
    runtime = start_runtime()
    steppers = [engine_stepper(n, config, runtime, quantized=n == "qat", compiled=on_gpu) for n in ("fp", "qat")]
    variants = [Variant(stepper.name, stepper.step) for stepper in steppers]
    seconds = interleaved(variants, rounds, warmup=3)
    for stepper in steppers:
        stepper.close()
    tokens = micro * length
    overhead = median(q / f for f, q in zip(seconds["fp"], seconds["qat"], strict=True)) - 1
    parameters = count_parameters(config.model)
    return Point(
        axis, parameters, micro, length, tokens / median(seconds["fp"]), tokens / median(seconds["qat"]), overhead
    )


def draw(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    keys = {"parameters": "parameters", "micro-batch": "micro_batch", "sequence length": "length"}
    for axis, (title, key) in zip(axes, keys.items(), strict=False):
        here = [point for point in points if point.axis == title]
        for name, style in (("fp", "o-"), ("qat", "s--")):
            axis.plot([getattr(p, key) for p in here], [getattr(p, name) for p in here], style, label=name)
        axis.set(xscale="log", yscale="log", xlabel=title, ylabel="tokens/s")
        axis.legend(["full precision", "QAT"])
    by_tokens = sorted((p for p in points if p.axis == "micro-batch"), key=lambda p: p.tokens)
    axes[3].plot([p.tokens for p in by_tokens], [100 * p.overhead for p in by_tokens], "o-")
    axes[3].set(xscale="log", xlabel="tokens a micro-batch", ylabel="time that QAT adds, %", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(given)
    if options.device == "cpu":
        import os

        os.environ["DS_ACCELERATOR"] = "cpu"
    from measure import use_threads

    from qatscale.tracking.environment import environment

    threads = use_threads(options.threads)
    on_gpu = options.device == "cuda"
    sizes: dict[str, Any] = QUICK if options.quick else CUDA if on_gpu else CPU
    rounds = 2 if options.quick else options.rounds
    points = []
    for place in places(sizes):
        points.append(measure(*place, options.bits, rounds, on_gpu))
        print(points[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"threads": threads, "bits": options.bits, "rounds": rounds, "environment": environment()}
    content = {**about, "points": [asdict(point) for point in points]}
    (options.out / "cost_growth.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(points, options.out / "cost_growth.png")


if __name__ == "__main__":
    main()
