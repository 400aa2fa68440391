"""Memory of one process in an optimizer step, in closed form.

Activations are counted as arXiv 2205.05198 (section 4) counts them, for this project's Llama: RMSNorm, SwiGLU, flash
attention, a loss in chunks. A block keeps per token, with width D, key-value width K, inner width I and w bytes an
element, all but the stream and the norms divided by the tensor-parallel processes:

    2·D·w the stream before each norm      2·(D·w + 4) each norm's output, and 1/rms     4·heads log Σ exp
    (2·D + 2·K)·w q, k, v, attended        4·I·w gate, SiLU(gate), up, their product

Sequence parallelism divides the stream and 1/rms too. Activation checkpointing keeps D·w and makes the rest again. In
QAT each product keeps a dense quantized copy of its weight until backward. A backward pass trades activations for
gradients at a constant rate, so the fullest moment is at one of its ends, or before or after it: `_moments`.

Kernels are those of CUDA. On CPU, where the formulas are measured (analysis/benchmarks/memory_estimate.md), a norm
keeps its normalised input in fp32 as well. Not counted: workspaces of kernels, the allocator's gaps, CUDA's context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from qatscale.config.schema import RunConfig
from qatscale.engine.estimate.local_sizes import LocalSizes, Matrix
from qatscale.engine.estimate.zero import FP32, ZeroSettings, gathered, gradient_bytes, resident
from qatscale.engine.layout import Layout
from qatscale.model.chunks import chunk_rows

Device = Literal["cuda", "cpu"]
Kind = Literal["weights", "gradients", "optimizer", "scales", "quantized", "activations", "buffers", "host"]
"""`weights`: those that forward reads, gathered ones included. `gradients`: of weights, all their copies. `optimizer`:
fp32 masters and Adam's moments of the weights. `scales`: α, its gradients and its optimizer state. `quantized`: the
fake-quantized copies that autograd keeps. `activations`: all else that a micro-batch makes. `buffers`: communication.
`host`: offloaded, not on the device."""
KINDS: tuple[Kind, ...] = get_args(Kind)
ON_DEVICE: tuple[Kind, ...] = KINDS[:-1]
Kinds = dict[Kind, int]
"""Bytes."""


def start_bytes(local: LocalSizes, zero: ZeroSettings) -> int:
    """Bytes on the device before the first step: the process's share of the model comes to it undivided and in fp32.

    In fp32 ZeRO-1 and 2 flatten a copy of each optimizer group; a cast to bf16 takes one parameter at a time.
    """
    copied = local.weights - local.norms if zero.weight == FP32 and zero.stage < 3 else 0
    return FP32 * (local.weights + local.scales + copied)


def between_steps(local: LocalSizes, zero: ZeroSettings) -> Kinds:
    """What a process holds between two steps, once one was taken."""
    kinds: Kinds = dict.fromkeys(KINDS, 0)
    for name, group in local.groups.items():
        held = resident(group, zero)
        kinds["host"] += held.host
        if name.startswith("scales"):
            kinds["scales"] += held.weights + held.gradients + held.optimizer
        else:
            kinds["weights"] += held.weights
            kinds["gradients"] += held.gradients
            kinds["optimizer"] += held.optimizer
    if zero.offloads and zero.stage < 3:  # one parameter passes from the device to the host at a time
        kinds["host"] += local.largest * zero.weight
        kinds["buffers"] += local.largest * zero.weight
    if zero.stage == 3 and zero.contiguous:
        kinds["buffers"] += zero.bucket * zero.reduced
    return kinds


def fullest_moment(
    config: RunConfig,
    layout: Layout,
    local: LocalSizes,
    zero: ZeroSettings,
    *,
    quantized: bool,
    device: Device = "cuda",
) -> tuple[str, Kinds]:
    """(what is going on, bytes) at the moment of a step with the most on the device."""
    held = between_steps(local, zero)
    moments = _moments(config, layout, local, zero, quantized, device)
    found = [(name, {kind: held[kind] + more.get(kind, 0) for kind in KINDS}) for name, more in moments]
    return max(found, key=lambda moment: sum(moment[1][kind] for kind in ON_DEVICE))


class _Activations(NamedTuple):
    """Bytes of the tensors of one micro-batch. wide: [tokens, D]. norm: what an RMSNorm keeps but its input.
    inner: [tokens, I]. block: all that a block keeps without activation checkpointing."""

    stream: int
    wide: int
    norm: int
    inner: int
    block: int


def _activations(config: RunConfig, layout: Layout, local: LocalSizes, weight: int, device: Device) -> _Activations:
    tokens = config.batch.micro_batch * config.data.sequence_length
    stream_tokens = tokens // (layout.tensor if config.engine.sequence_parallel else 1)
    stream, wide = (n * local.hidden_size * weight for n in (stream_tokens, tokens))
    norm = wide + FP32 * stream_tokens
    if device == "cpu":  # the normalised input, and the input in fp32 instead of its own precision
        norm += stream_tokens * local.hidden_size * (2 * FP32 - weight)
    query, key, gate = local.block[0].rows, local.block[1].rows, local.block[4].rows
    attention = 2 * (query + key) * weight + FP32 * config.model.heads // layout.tensor
    inner = tokens * gate * weight
    return _Activations(stream, wide, norm, inner, 2 * stream + 2 * norm + tokens * attention + 4 * inner)


def _moments(
    config: RunConfig, layout: Layout, local: LocalSizes, zero: ZeroSettings, quantized: bool, device: Device
) -> Iterator[tuple[str, Kinds]]:
    """Moment → bytes of each kind beside what is held between steps."""
    made, recomputes = _activations(config, layout, local, zero.weight, device), config.engine.activation_checkpointing
    micro_batches = config.batch.micro_batches(layout.data)
    in_flight = min(layout.pipeline - local.stage.index, micro_batches)  # one forward, one backward
    trained = {name: group for name, group in local.groups.items() if quantized or not name.startswith("scales")}
    grads = gradient_bytes(trained, zero)
    earlier = grads.accumulated if micro_batches > in_flight else 0
    live = gathered(local.groups, zero)[1] * zero.weight

    def copies(*matrices: Matrix | None) -> int:
        """Bytes of quantized weights."""
        return quantized * zero.weight * sum(m.numel for m in matrices if m and m.bits is not None)

    kept = made.stream * (1 if local.stage.is_first else 2)  # received, and kept to send its gradient
    kept += local.blocks * (made.stream if recomputes else made.block) + (made.norm if local.head else 0)
    kept_copies = 0 if recomputes else local.blocks * copies(*local.block)
    kept_copies += made.wide if copies(local.embed) else 0  # the embedding quantizes the rows that it looks up

    def moment(
        name: str, flying: int, gradients: int, buffers: int, activations: int = 0, copies: int = 0
    ) -> tuple[str, Kinds]:
        """flying: micro-batches whose backward pass has not ended."""
        return name, {
            "activations": flying * kept + activations,
            "quantized": flying * kept_copies + copies,
            "weights": live if flying == in_flight else 0,
            "buffers": buffers,
            "gradients": gradients,
        }

    waiting = 0
    if local.head:
        tokens = config.batch.micro_batch * config.data.sequence_length
        logits, gradient = _loss(local.head, tokens, zero.weight, device)
        bucket = grads.bucket if zero.stage == 1 else 0
        yield moment("loss", in_flight, earlier + gradient, bucket, made.wide + logits, copies(local.head))
        waiting = local.head.numel * zero.weight if local.tied_here else 0  # for the embedding's gradient
    waiting += local.block[-1].numel * zero.weight * (2 if quantized else 1)
    working = (made.block if recomputes else 0) + made.stream + made.inner
    again = copies(*local.block) if recomputes else 0
    yield moment("backward", in_flight, earlier + waiting, grads.bucket, working, again)
    buffers = grads.bucket + (grads.copy if zero.stage > 1 and zero.bucket < local.weights else 0)
    yield moment("backward", in_flight - 1, grads.accumulated + waiting, buffers, working, again)
    buckets = grads.bucket * (2 if layout.pipeline > 1 else 1)  # PipelineEngine makes another
    yield moment("reduction of gradients", 0, grads.reducing, buckets + grads.copy)
    yield moment("optimizer step", 0, grads.update, 0)


def _loss(head: Matrix, tokens: int, weight: int, device: Device) -> tuple[int, int]:
    """Bytes of a chunk of logits with what is made of it, and of the head's gradient, which fp32 sums over chunks."""
    rows = chunk_rows(tokens, head.rows, device)
    logits, chunked = rows * head.rows, rows < tokens
    made = logits * weight
    if weight != FP32:
        made += max(logits * (FP32 + weight), (logits + head.numel) * weight if chunked else 0)
    return made, head.numel * (FP32 if chunked else weight)
