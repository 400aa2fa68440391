"""The quantizers' Triton kernels on one GPU: whether they are right, how fast, and what a layer costs.

    python kernels.py --device cuda --out RECORDS

Parts: `correct` holds both passes against the plain arithmetic (values and dL/dw to the bit, dL/dα to float64) and
against themselves (bit for bit the same every time). `bandwidth` times them in a CUDA graph, over weights that do not
fit the second-level cache, beside a copy, and at 4 bits in bf16 for several ways to cut them up. `layer` times
FakeQuantLinear against Linear over the tokens of a micro-batch. `--device cpu` runs the same with the plain arithmetic
on toy sizes: it tests the script.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from record import Record, about_here, require
from torch import Tensor, nn

from qatscale.quant import reference
from qatscale.quant.bit_widths import QUANTIZERS, Quantizer
from qatscale.quant.layers import FakeQuantLinear
from qatscale.quant.scales import initial_scale

PARTS = ("correct", "bandwidth", "layer")
SHAPES: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((257, 511), None), ((130, 96), 32), ((1, 1), None), ((3, 1025), None), ((64, 4096), 128), ((2, 3, 40), 8),
    ((1000, 2048), None), ((33, 14336), None),
)  # fmt: skip
"""(weight, group size): odd ones, groups, rows of several tiles. Every one is a kernel to compile, half a second."""
FEW = 2
"""Of the shapes, for the widths from 3 bits on but 4, which are the same code with other numbers."""
WEIGHTS = {
    "cuda": ((1024, 1024), (2048, 5504), (4096, 4096), (4096, 14336), (8192, 28672)),
    "cpu": ((64, 64), (128, 512)),
}
TILES = tuple(itertools.product((1024, 2048, 4096, 8192), (2, 4, 8)))
"""(weights, warps) of a program."""
TARGET = 0.8
"""Of the copy's bandwidth."""
LARGE = 8_000_000
"""Weights from which the target holds: below, starting a kernel is a good part of its time."""
LAYERS = {"cuda": ((768, 768), (1536, 4096), (4096, 4096), (4096, 14336)), "cpu": ((32, 48),)}
TOKENS = {"cuda": (1024, 4096, 16384, 32768), "cpu": (8, 16)}


class Bench:
    def __init__(self, device: str) -> None:
        self.device = device
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            from qatscale.quant import triton_kernels

            self.kernels: Any = triton_kernels
        else:
            self.kernels = reference
        self.copies: dict[torch.dtype, float] = {}

    # --- correct ---

    def correct(self, quantizer: Quantizer, dtype: torch.dtype) -> Mapping[str, Any]:
        """Values and dL/dw to the bit; the largest error of dL/dα over the sum of its terms' sizes."""
        worst, weights = 0.0, 0
        for w, alpha, grad in self._cases(quantizer, dtype):
            scales = {alpha.dtype: alpha} | ({torch.float32: alpha.float()} if w.shape == SHAPES[0][0] else {})
            for scale in scales.values():
                worst = max(worst, self._compare(quantizer, w, scale, grad))
                weights += w.numel()
        return require(worst < 3e-6, "dL/dα is off", {"weights": weights, "error of dL/dalpha": worst})

    def _compare(self, quantizer: Quantizer, w: Tensor, alpha: Tensor, grad: Tensor) -> float:
        value = self.kernels.quantize(quantizer, w, alpha)
        grad_w, grad_alpha = self.kernels.gradients(quantizer, grad, w, alpha, 0.25)
        for other in (self.kernels.quantize(quantizer, w, alpha) for _ in range(2)):
            assert torch.equal(other, value), "not the same twice"
        again = self.kernels.gradients(quantizer, grad, w, alpha, 0.25)
        assert torch.equal(again[0], grad_w), "not the same twice"
        assert torch.equal(again[1], grad_alpha), "not the same twice"
        for place in {self.device, "cpu"}:  # the plain arithmetic of either device
            here = [tensor.to(place) for tensor in (grad, w, alpha)]
            assert torch.equal(reference.quantize(quantizer, *here[1:]), value.to(place)), f"values, {w.shape}, {place}"
            assert torch.equal(reference.gradients(quantizer, *here, 0.25)[0], grad_w.to(place)), f"dL/dw, {w.shape}"
        exact, size = exact_alpha_gradient(quantizer, w, alpha, grad, 0.25)
        rounding = torch.finfo(alpha.dtype).eps * exact.abs() if alpha.dtype != torch.float32 else 0.0
        error = ((grad_alpha.double() - exact).abs() - rounding).clamp_min(0) / size.clamp_min(1e-30)
        return error.max().item()

    def _cases(self, quantizer: Quantizer, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(w, α, dL/dŵ): Gaussian weights of which some are clipped, then ties, edges, zeros and denormals."""
        generator = torch.Generator().manual_seed(1)
        few = quantizer.name == "lsq" and quantizer.bits != 4
        for shape, group_size in SHAPES[: FEW if few or not self.on_gpu else None]:
            w = torch.randn(shape, generator=generator).to(dtype)
            alpha = initial_scale(quantizer, w, group_size)
            alpha *= torch.linspace(0.5, 1.1, alpha.numel()).reshape(alpha.shape)
            yield tuple(
                t.to(self.device) for t in (w, alpha.to(dtype), torch.randn(shape, generator=generator).to(dtype))
            )
        edges = torch.arange(-300, 301) / 2
        edges = torch.cat([edges, edges / quantizer.steps, (edges + quantizer.shift) / quantizer.steps])
        edges = torch.cat([edges, torch.tensor([-1.0, -0.99, 0.99, 1.0, 0.0, -0.0, 1e-40, -1e-40, 1e-45, 1e30, -1e30])])
        edges = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)])
        scales = torch.tensor([1.0, 0.5, 3e-5, 0.7, 1e-5, 9e-6, 0.0, -1.0, 1.0])
        w = edges * scales.clamp_min(1e-5).unsqueeze(-1)
        w[-1] = 0
        yield tuple(t.to(dtype).to(self.device) for t in (w, scales, torch.randn(w.shape, generator=generator)))

    def not_contiguous(self) -> None:
        quantizer = QUANTIZERS[2]
        w = torch.randn(64, 96, device=self.device).T
        alpha, grad = initial_scale(quantizer, w) * 0.7, torch.randn(1, 64, device=self.device).expand(96, 64)
        self._compare(quantizer, w, alpha, grad)

    def documents(self, grouped: bool) -> Mapping[str, Any]:
        """Attention within documents: the variable-length kernel in bf16 against a mask in fp32, with gradients."""
        from qatscale.model.documents import attend, find_documents

        length, channels, end = (2048, 64, 7) if self.on_gpu else (64, 16, 7)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(300, (2, length), generator=generator).to(self.device)
        shapes = [(2, 8, length, channels)] + [(2, 2 if grouped else 8, length, channels)] * 2
        leaves = [torch.randn(shape, generator=generator).bfloat16().to(self.device) for shape in shapes]
        grad = torch.randn(shapes[0], generator=generator).bfloat16().to(self.device)

        def with_gradients(dtype: torch.dtype, kernel: bool) -> list[Tensor]:
            given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
            mixed = attend(*given, grouped, find_documents(tokens, end, kernel))
            return [mixed.detach(), *torch.autograd.grad(mixed, given, grad.to(dtype))]

        found, expected = with_gradients(torch.bfloat16, self.on_gpu), with_gradients(torch.float32, False)
        pairs = zip("oqkv", found, expected, strict=True)
        errors = {f"error of {name}": float((f.float() - e).norm() / e.norm()) for name, f, e in pairs}
        return require(max(errors.values()) < 2e-2, "not what the mask gives", errors)

    # --- bandwidth ---

    def copy_bandwidth(self, dtype: torch.dtype) -> Mapping[str, Any]:
        """Bytes read and written a second by Tensor.copy_ of 1 GiB, the best of several."""
        numel = (1 << 30 if self.on_gpu else 1 << 20) // dtype.itemsize
        source, target = (torch.zeros(numel, dtype=dtype, device=self.device) for _ in range(2))
        self.copies[dtype] = 2 * source.nbytes / self.seconds([lambda: target.copy_(source)])
        return {"copy GB/s": self.copies[dtype] / 1e9}

    def bandwidth(self, quantizer: Quantizer, dtype: torch.dtype, shape: tuple[int, int]) -> Mapping[str, Any]:
        """Of both passes, as a share of the copy's, with the configuration that is in use and the best of TILES."""
        copies = 1 + (256 << 20) // (math.prod(shape) * dtype.itemsize) if self.on_gpu else 2
        copies = min(copies, 64)  # together past the second-level cache, or near it
        ws = [torch.randn(shape, device=self.device).to(dtype) for _ in range(copies)]
        grads = [torch.randn(shape, device=self.device).to(dtype) for _ in range(copies)]
        alphas = [(initial_scale(quantizer, w) * 0.9).to(dtype) for w in ws]
        numbers: dict[str, Any] = {}
        for name, moved, run in (
            ("forward", 2, lambda i, *tile: self.kernels.quantize(quantizer, ws[i], alphas[i], *tile)),
            ("backward", 3, lambda i, *tile: self.kernels.gradients(quantizer, grads[i], ws[i], alphas[i], 0.1, *tile)),
        ):
            moved *= ws[0].nbytes

            def share(*tile: Any, run: Callable[..., object] = run, moved: int = moved) -> float:
                calls = [lambda i=i: run(i, *tile) for i in range(copies)]
                return moved / self.seconds(calls) / self.copies[dtype]

            numbers[name] = share()
            if self.on_gpu and (quantizer.bits, dtype) == (4, torch.bfloat16):
                found = {tile: share(self.kernels.Tile(*tile)) for tile in TILES}
                best = max(found, key=lambda tile: found[tile])
                numbers |= {f"best {name}": found[best], f"best {name} tile": f"{best[0]} weights, {best[1]} warps"}
        slow = self.on_gpu and math.prod(shape) >= LARGE and min(numbers["forward"], numbers["backward"]) < TARGET
        return require(not slow, f"below {TARGET:.0%} of the copy's bandwidth", numbers)

    # --- layer ---

    def layer(self, shape: tuple[int, int], tokens: int, compiled: bool) -> Mapping[str, Any]:
        """Time of forward and backward over a Linear's."""
        rows, columns = shape
        plain = nn.Linear(columns, rows, bias=False, device=self.device, dtype=torch.bfloat16)
        layers: dict[str, nn.Module] = {"Linear": plain}
        for name, bits in (("1 bit", 1), ("2 bits", 2), ("4 bits", 4)):
            layer = FakeQuantLinear.convert(
                nn.Linear(columns, rows, bias=False, device=self.device, dtype=torch.bfloat16), bits
            )
            layer.weight_scale.data = initial_scale(layer.quantizer, layer.weight).bfloat16()
            layer.mode = "learned"
            layers[name] = layer
        x = torch.randn(tokens, columns, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(tokens, rows, device=self.device, dtype=torch.bfloat16)
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        calls = {name: torch.compile(layer) if compiled else layer for name, layer in layers.items()}
        for turn in range(23 if self.on_gpu else 4):
            for name, call in calls.items():
                for leaf in (x, *layers[name].parameters()):
                    leaf.grad = None
                taken = self._once(lambda call=call: call(x).backward(grad))
                if turn >= 3:
                    seconds[name].append(taken)
        base = statistics.median(seconds.pop("Linear"))
        return {"Linear µs": base * 1e6} | {name: statistics.median(s) / base for name, s in seconds.items()}

    # --- time ---

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one of the calls, which run one after the other without a host between them; the best of some rounds."""
        if not self.on_gpu:
            return min(self._once(lambda: [call() for call in calls]) for _ in range(3)) / len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile, and warm up the allocator
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        repeats = max(1, 16 // len(calls))
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                kept = [call() for call in calls]  # results apart, so that writing them is not the cache's business
        del kept
        graph.replay()
        return min(self._once(graph.replay) for _ in range(8)) / (repeats * len(calls))

    def _once(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def exact_alpha_gradient(
    quantizer: Quantizer, w: Tensor, alpha: Tensor, grad: Tensor, grad_factor: float
) -> tuple[Tensor, Tensor]:
    """dL/dα summed in float64, and the sum of the sizes of its terms.

    Which level a weight takes, and whether it is clipped, is what fp32's w/α says: on a tie float64's says otherwise.
    """
    x, a = reference.rows_of(w, alpha)
    v, code = x / a, reference.encode_rows(quantizer, x, a).double()
    inside = (v >= quantizer.low) & (v <= quantizer.high)
    level, exact_v = (code + quantizer.shift) / quantizer.steps, x.double() / a.double()
    outside = code if quantizer.name == "ternary" else level
    slope = code if quantizer.name == "binary" else torch.where(inside, level - exact_v, outside)
    upstream = grad.double().reshape(x.shape)
    sizes = (slope.abs() + level.abs()) * upstream.abs()
    return tuple((part.sum(-1) * grad_factor).reshape(alpha.shape) for part in (slope * upstream, sizes))


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    bench = Bench(options.device)
    about = about_here(options.device, options.commit)
    record = Record(options.out, "kernels", "The quantizers' kernels", about, options.seconds)
    dtypes = (torch.bfloat16, torch.float32)
    if "correct" in options.parts:
        for (bits, quantizer), dtype in itertools.product(QUANTIZERS.items(), dtypes):
            record.check(f"correct: {bits:g} bits, {dtype}", lambda q=quantizer, d=dtype: bench.correct(q, d))
        record.check("correct: not contiguous", bench.not_contiguous)
        for grouped in (False, True):
            name = f"correct: attention within documents{', grouped heads' * grouped}"
            record.check(name, lambda g=grouped: bench.documents(g))
    if "bandwidth" in options.parts:
        for dtype in dtypes:
            record.check(f"bandwidth: copy, {dtype}", lambda d=dtype: bench.copy_bandwidth(d))
            for shape, bits in itertools.product(WEIGHTS[options.device], (1, 2, 4)):
                if bits == 4 or (dtype == torch.bfloat16 and math.prod(shape) <= 4096 * 4096):
                    name = f"bandwidth: {shape[0]} x {shape[1]}, {bits} bits, {dtype}, share of the copy's"
                    record.check(name, lambda q=QUANTIZERS[bits], d=dtype, s=shape: bench.bandwidth(q, d, s))
    if "layer" in options.parts:
        compilers = (False, True) if bench.on_gpu else (False,)  # compiled ones take half a minute a shape
        for compiled, shape, tokens in itertools.product(compilers, LAYERS[options.device], TOKENS[options.device]):
            if compiled and (tokens != 16384 or shape[0] not in (768, 4096)):
                continue
            name = f"layer{', compiled' if compiled else ''}: {shape[1]} -> {shape[0]}, {tokens} tokens, over Linear"
            record.check(name, lambda s=shape, t=tokens, c=compiled: bench.layer(s, t, c))
    return 1 if record.failed else 0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="for the record")
    parser.add_argument("--seconds", type=float, default=450, help="begin no check after so many")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--commit", help="where the code lies in no repository")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
