"""Memory of one process, on its device and on its host, in closed form.

What ZeRO keeps between steps follows ZeRO's table (arXiv 1910.02054, section 5), which divides optimizer state, then
gradients, then weights by the data-parallel processes. DeepSpeed 0.19.8 adds flat copies and buckets to it
(`runtime/bf16_optimizer.py`, `runtime/zero`).

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

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from qatscale.config.ds_config import precision_of
from qatscale.engine.estimate.local_sizes import LocalSizes, Matrix
from qatscale.model.chunks import chunk_rows

FP32 = 4
"""Bytes of an element."""
GPUS_A_NODE = 8
LIBRARIES = 850_000_000
"""Bytes of a process without its tensors: Python, torch, DeepSpeed, MLflow, batches. Measured on CPU: 0.77 to 0.84 GB
(analysis/benchmarks/memory_estimate.md). CUDA's own host memory comes on top and is not known here."""
_BF16_BUCKET = 500_000_000
"""Elements of a bucket of the BF16_Optimizer: `MEMORY_OPT_ALLREDUCE_SIZE` of DeepSpeed's `runtime/engine.py`."""
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
Group = Mapping[int, int]
"""An optimizer group: elements of a parameter → number of such parameters."""


# --- what ZeRO keeps ---


class ZeroSettings:
    """The settings of a checked ds_config, before or after `merge_ds_config`, with DeepSpeed's defaults.

    Bytes of an element: `weight`, `accumulated` gradient, `reduced` (communicated) gradient. Other sizes in elements.
    """

    def __init__(self, ds: Mapping[str, Any], data: int) -> None:
        """data: processes that share gradients and states."""
        zero, size = ds["zero_optimization"], {"fp32": FP32, "bf16": 2}
        self.stage: int = zero["stage"]
        self.data = data
        self.weight = size[precision_of(ds)]
        self.accumulated = max(self.weight, size[ds.get("data_types", {}).get("grad_accum_dtype", "fp32")])
        self.reduced = size[ds.get("communication_data_type", "fp32")]
        self.bucket = int(zero.get("reduce_bucket_size", 5e8))
        self.contiguous: bool = zero.get("contiguous_gradients", True)
        """Gradients are copied into a buffer of `bucket` elements to be reduced."""
        self.overlaps: bool = zero.get("overlap_comm", self.stage == 3)
        """Gradients are reduced while backward continues, with two buckets in turns."""
        self.offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        """Optimizer state lives on the host; with `offloads_weights` ZeRO-3's shards of the weights too."""
        self.offloads_weights = zero.get("offload_param", {}).get("device", "none") != "none"
        self.prefetches = zero.get("stage3_prefetch_bucket_size", 5e7) > 0
        most_live = zero.get("stage3_max_live_parameters", 1e9) if self.prefetches else 0
        self.most_gathered = int(max(most_live, zero.get("stage3_max_reuse_distance", 1e9) / 2))
        """ZeRO-3 holds gathered weights of up to so many elements: prefetched, or kept for their use in backward."""
        self.persists = int(zero.get("stage3_param_persistence_threshold", 1e5))
        """ZeRO-3 leaves parameters of up to so many elements undivided."""
        self.sub_group = int(zero.get("sub_group_size", 1e9))
        self.keeps_fp32_gradients = (
            self.stage == 1 and self.weight != FP32 and self.accumulated == FP32 and not self.offloads
        )
        """Whether DeepSpeed takes its BF16_Optimizer (`runtime/engine.py`, `_do_optimizer_sanity_check`)."""


def partition(group: Group, zero: ZeroSettings) -> int:
    """Elements of a process's part. ZeRO-1 and 2 flatten the group, pad it to a multiple of 2 x data and cut it."""
    if zero.stage == 3:
        return sum(-(-numel // zero.data) * count for numel, count in group.items())
    return -(-_elements(group) // (2 * zero.data)) * 2


def _elements(group: Group) -> int:
    return sum(numel * count for numel, count in group.items())


def _undivided(group: Group, zero: ZeroSettings) -> int:
    return sum(n * count for n, count in group.items() if n <= zero.persists) if zero.data > 1 else 0


def gathered(groups: Mapping[str, Group], zero: ZeroSettings) -> tuple[int, int]:
    """(elements that ZeRO-3 divides, and so gathers for each use; of them those that stay gathered until backward)."""
    if zero.stage < 3 or zero.data == 1:
        return 0, 0
    divided = sum(_elements(group) - _undivided(group, zero) for group in groups.values())
    return divided, min(divided, zero.most_gathered)


def between_steps(local: LocalSizes, zero: ZeroSettings) -> Kinds:
    """What a process holds between two steps, once one was taken."""
    kinds: Kinds = dict.fromkeys(KINDS, 0)
    for name, group in local.groups.items():
        part = partition(group, zero)
        masters, low = FP32 * part, zero.weight * part
        states = 3 * masters  # the masters and two moments
        host = 0
        if zero.stage == 3:
            weights, gradients = _undivided(group, zero) * zero.weight + low, part * zero.accumulated
            if zero.offloads_weights:
                weights, host = weights - low, low
        else:
            weights, gradients = low * zero.data, masters * zero.data if zero.keeps_fp32_gradients else 0
        if zero.offloads:  # also gradients on their way down and, before ZeRO-3, weights on their way up
            host += states + masters + (low if zero.stage < 3 else 0)
            gradients = states = 0
        kinds["host"] += host
        if name.startswith("scales"):
            kinds["scales"] += weights + gradients + states
        else:
            kinds["weights"] += weights
            kinds["gradients"] += gradients
            kinds["optimizer"] += states
    if zero.offloads and zero.stage < 3:  # one parameter passes from the device to the host at a time
        kinds["host"] += local.largest * zero.weight
        kinds["buffers"] += local.largest * zero.weight
    if zero.stage == 3 and zero.contiguous:
        kinds["buffers"] += zero.bucket * zero.reduced
    return kinds


class _Gradients(NamedTuple):
    """Bytes that gradients take in a step beside what is held between steps.

    accumulated: after a backward pass. bucket: buffers that gradients pass, made when the first one comes. copy: of a
    full bucket, to reduce it. reducing: after the last backward pass, beside both. update: in the optimizer's step.
    """

    accumulated: int
    bucket: int
    copy: int
    reducing: int
    update: int


def _gradients(groups: Mapping[str, Group], zero: ZeroSettings) -> _Gradients:
    """groups: those whose parameters get gradients."""
    elements = sum(map(_elements, groups.values()))
    part = sum(partition(group, zero) for group in groups.values())
    largest = max(max(group) for group in groups.values())
    if zero.keeps_fp32_gradients:  # bf16 gradients stay to the step; the fp32 ones are reduced in copies
        copied = elements * FP32 if elements <= _BF16_BUCKET else 0
        cast = min(elements, _BF16_BUCKET) * zero.reduced if zero.reduced != FP32 else 0
        kept = elements * zero.weight
        return _Gradients(kept, 0, copied + cast, kept, kept)
    full = min(max(zero.bucket, largest), elements)
    if zero.stage == 3:
        sub_group = min(part, zero.sub_group + largest // zero.data)  # it ends with the parameter that fills it
        return _Gradients(0, 0, full * zero.reduced, 0, 0 if zero.offloads else sub_group * FP32)
    widens = zero.weight != zero.accumulated
    element = zero.accumulated if zero.stage == 1 else zero.weight
    bucket = zero.bucket * element * (2 if zero.overlaps else 1) if zero.contiguous else 0
    copied = element if zero.data > 1 or widens else 0
    copy = full * (copied + (zero.reduced if zero.reduced != zero.weight else 0))
    # in bf16 the partition's own elements, summed in fp32; in fp32 all of each parameter that it has a part of
    kept = part * FP32 if widens else 0 if zero.offloads else min(elements, part + largest) * FP32
    update = kept if widens or zero.offloads else kept + part * FP32
    if zero.stage == 2:
        return _Gradients(kept, bucket, copy, kept, update)
    waiting = elements * element  # ZeRO-1 keeps all until the last micro-batch
    return _Gradients(waiting, bucket, copy, waiting + kept - (full * element if bucket else 0), update)


# --- the start, the fullest moment, the host ---


def start_bytes(local: LocalSizes, zero: ZeroSettings) -> int:
    """Bytes of weights on the device before optimizer states are made, at the fullest moment.

    ZeRO-1 and 2 flatten a copy of each optimizer group. ZeRO-3 divides one parameter after the other as it gets its
    memory, and then copies the shares into one buffer.
    """
    if zero.stage < 3:
        return zero.weight * (2 * local.weights - local.norms + local.scales)
    share = sum(partition(group, zero) for group in local.groups.values())
    return zero.weight * (share + max(share, local.largest))


def fullest_moment(
    local: LocalSizes, zero: ZeroSettings, *, quantized: bool, device: Device = "cuda"
) -> tuple[str, Kinds]:
    """(name, bytes) of the moment of a step with the most on the device."""
    moments = _moments(local, zero, quantized, device)
    return max(moments, key=lambda moment: sum(moment[1][kind] for kind in ON_DEVICE))


def _moments(local: LocalSizes, zero: ZeroSettings, quantized: bool, device: Device) -> Iterator[tuple[str, Kinds]]:
    config, layout, held = local.config, local.layout, between_steps(local, zero)
    weight, recomputes = zero.weight, config.engine.activation_checkpointing
    # tensors of one micro-batch; wide: [tokens, D], norm: what an RMSNorm keeps but its input, inner: [tokens, I]
    tokens = config.batch.micro_batch * config.data.sequence_length
    stream_tokens = tokens // (layout.tensor if config.engine.sequence_parallel else 1)
    stream, wide = (n * local.hidden_size * weight for n in (stream_tokens, tokens))
    norm = wide + FP32 * stream_tokens
    if device == "cpu":  # the normalised input, and the input in fp32 instead of its own precision
        norm += stream_tokens * local.hidden_size * (2 * FP32 - weight)
    query, key, gate = local.block[0].rows, local.block[1].rows, local.block[4].rows
    attention = 2 * (query + key) * weight + FP32 * config.model.heads // layout.tensor
    if config.model.qk_norm:  # as above: the inputs, and what the norms keep of them
        normed = weight if device == "cuda" else 2 * FP32
        attention += (query + key) * normed + FP32 * (query + key) // config.model.channels
    inner = tokens * gate * weight
    block = 2 * stream + 2 * norm + tokens * attention + 4 * inner

    micro_batches = config.batch.micro_batches(layout.data)
    in_flight = min(layout.pipeline - local.stage.index, micro_batches)  # one forward, one backward
    trained = {name: group for name, group in local.groups.items() if quantized or not name.startswith("scales")}
    grads = _gradients(trained, zero)
    earlier = grads.accumulated if micro_batches > in_flight else 0
    live = gathered(local.groups, zero)[1] * weight

    def copies(*matrices: Matrix | None) -> int:
        return quantized * weight * sum(m.numel for m in matrices if m and m.bits is not None)

    kept = stream * (1 if local.stage.is_first else 2)  # received, and kept to send its gradient
    kept += local.blocks * (stream if recomputes else block) + (norm if local.head else 0)
    kept_copies = 0 if recomputes else local.blocks * copies(*local.block)
    kept_copies += wide if copies(local.embed) else 0  # the embedding quantizes the rows that it looks up

    def moment(
        name: str, flying: int, gradients: int, buffers: int, activations: int = 0, copies: int = 0
    ) -> tuple[str, Kinds]:
        """flying: micro-batches whose backward pass has not ended."""
        return name, held | {
            "activations": held["activations"] + flying * kept + activations,
            "quantized": held["quantized"] + flying * kept_copies + copies,
            "weights": held["weights"] + (live if flying == in_flight else 0),
            "buffers": held["buffers"] + buffers,
            "gradients": held["gradients"] + gradients,
        }

    waiting = 0
    if local.head:
        logits, gradient = _loss(local.head, tokens, weight, device)
        bucket = grads.bucket if zero.stage == 1 else 0
        yield moment("loss", in_flight, earlier + gradient, bucket, wide + logits, copies(local.head))
        waiting = local.head.numel * weight if local.tied_here else 0  # for the embedding's gradient
    waiting += local.block[-1].numel * weight * (2 if quantized else 1)
    working = (block if recomputes else 0) + stream + inner
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


class HostMemory:
    """Bytes of a node whose processes all hold what the fullest stage's do.

    Initial weights are drawn in pieces of 128 KiB on their way to the device. Token shards are memory-mapped: the
    system drops their pages when others need the memory.
    """

    def __init__(self, stages: list[LocalSizes], zero: ZeroSettings) -> None:
        self.processes = min(GPUS_A_NODE, stages[0].layout.processes)
        self.libraries = self.processes * LIBRARIES
        copied = 3 * FP32 if stages[0].config.checkpoint.background else 0
        parts = [sum(partition(group, zero) for group in local.groups.values()) for local in stages]
        self.checkpoint = self.processes * copied * max(parts)
        """The copy from which `checkpoint.background` writes: 12 bytes a parameter, page-locked with a GPU."""
        self.offloaded = self.processes * max(between_steps(local, zero)["host"] for local in stages)
        self.total = self.libraries + self.checkpoint + self.offloaded
