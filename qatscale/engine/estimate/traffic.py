"""What a process sends in an optimizer step, and the time it takes.

Collectives are counted as rings send them (arXiv 1910.02054, section 7): of S bytes on N processes an all-gather and a
reduce-scatter send (N - 1)/N·S each, an all-reduce both. Their number is the code's: in a block
`qatscale.model.tensor_parallel` (arXiv 2205.05198, section 4.2), at the end of a backward pass and of a step DeepSpeed
0.19.8 (`runtime/zero`).
"""

from __future__ import annotations

from qatscale.engine.estimate.local_sizes import LocalSizes
from qatscale.engine.estimate.memory import FP32, GPUS_A_NODE, ZeroSettings, gathered
from qatscale.engine.layout import Layout

INSIDE, BETWEEN = 400.0, 50.0
"""GB/s that a process sends in a collective (nccl-tests' bus bandwidth), within a node and between nodes.

400: eight H100 on NVLink; measured 436 (256 MB all-reduce) [1]. 50: one 400 Gb/s port a GPU; measured for the same
collective 362 on 2 nodes of eight, 100 on 8, 65 on 32 and 33 on 64 [1]. [1]: Ultra-Scale Playbook, nanotron, 2025."""
Traffic = dict[str, int]
"""Kind, which ends in the group that exchanges it → bytes that a process sends a step."""
GRADIENTS, WEIGHTS = "gradients over data", "weights over data"


def traffic_of(local: LocalSizes, zero: ZeroSettings, *, quantized: bool) -> Traffic:
    """The traffic of a process of one stage."""
    config, layout, stage = local.config, local.layout, local.stage
    model, engine = config.model, config.engine
    micro_batches = config.batch.micro_batches(layout.data)
    tokens = config.batch.micro_batch * config.data.sequence_length
    stream = tokens * local.hidden_size * zero.weight
    scales = local.scales if quantized else 0

    # ZeRO-1 reduces once a step, 2 and 3 every micro-batch. The bf16 optimizer sends zeros for scales not yet in use.
    reduced = (local.weights + (local.scales if zero.keeps_fp32_gradients else scales)) * zero.reduced
    gradients = {1: 2, 2: 2 * micro_batches, 3: micro_batches}[zero.stage] * _ring(reduced, zero.data)

    # ZeRO-1 and 2 gather new weights once a step, ZeRO-3 all matrices in every pass
    weights = local.weights + local.scales
    if zero.stage == 3:
        divided, kept = gathered(local.groups, zero)
        weights += micro_batches * (2 * divided - kept) - divided  # what is not divided follows once a step

    # a block sums its output twice forward and its input's gradient twice backward, each in two passes of a ring;
    # recomputation ends before the MLP's sum. The embedding sums forward, the head backward.
    passes = (8 + ((3 if engine.sequence_parallel else 2) if engine.activation_checkpointing else 0)) * local.blocks
    passes += 2 * (stage.is_first + stage.is_last)
    loss = 2 * _ring(3 * FP32 * tokens, layout.tensor) if stage.is_last else 0  # three numbers a token
    # gradients of what every tensor-parallel process holds and sees a part of: o's and down's scales, norms
    shared = sum(m.scales for m in (local.block[3], local.block[6])) * local.blocks if scales else 0
    shared = 0 if config.qat.group_size else shared
    norms = local.norms if engine.sequence_parallel else 0

    # between tensor-parallel stages DeepSpeed sends each process's part and gathers the rest at the other end
    ways = (not stage.is_first) + (not stage.is_last)
    part = stream // layout.tensor + (0 if engine.sequence_parallel else _ring(stream, layout.tensor))
    table = local.embed or local.head
    tied = layout.pipeline > 1 and model.tied_embedding and table is not None
    table_elements = table.numel + (table.scales if quantized else 0) if table is not None and tied else 0
    return {
        GRADIENTS: gradients,
        WEIGHTS: _ring(weights * zero.weight, zero.data),
        "activations over tensor": micro_batches * (passes * _ring(stream, layout.tensor) + loss),
        "gradients over tensor": micro_batches * 2 * _ring((shared + norms) * zero.weight, layout.tensor),
        "stream between stages": micro_batches * ways * part,
        "tied table over stages": 2 * _ring(table_elements * (FP32 if zero.keeps_fp32_gradients else zero.weight), 2),
    }


def _ring(size: int, processes: int) -> int:
    """Bytes that a process sends for an all-gather or a reduce-scatter of `size` bytes."""
    return size * (processes - 1) // processes


# --- time ---


class NetworkTime:
    """Seconds of an optimizer step's traffic, and of it what the engine hides behind the arithmetic.

    ZeRO-3 prefetches weights throughout a step. With `overlap_comm` gradients are reduced behind backward, under ZeRO-1
    behind that of the last micro-batch. All else waits, and so do the bf16 optimizer and pipelines.
    """

    def __init__(
        self,
        traffic: Traffic,
        layout: Layout,
        zero: ZeroSettings,
        *,
        bandwidth: float | None,
        compute: float | None,
        micro_batches: int,
        recomputes: bool,
    ) -> None:
        """bandwidth: GB/s over the job's slowest link; None = by its kind. compute: seconds of arithmetic."""
        nodes = -(-layout.processes // GPUS_A_NODE)
        self.gigabytes_per_second = bandwidth or (BETWEEN if nodes > 1 else INSIDE)
        """Over the job's slowest link: between nodes, or inside the only one."""
        self.nodes = nodes
        # tensor-parallel neighbours have adjacent ranks, then data-parallel ones, then stages
        spans = {"tensor": layout.tensor, "data": layout.tensor * layout.data, "stages": layout.processes}
        seconds = {}
        for kind, size in traffic.items():
            inside = nodes > 1 and spans[kind.split()[-1]] <= GPUS_A_NODE
            seconds[kind] = size / 1e9 / (INSIDE if inside else self.gigabytes_per_second)
        self.seconds = sum(seconds.values())
        """All collectives, one after another."""
        self.overlapped: float | None = None
        """The seconds of these that pass while the GPU computes; None where the arithmetic's time is unknown."""
        if compute is not None:
            backward = compute * (3 / 4 if recomputes else 2 / 3) / (micro_batches if zero.stage == 1 else 1)
            reduces = zero.overlaps and not zero.keeps_fp32_gradients and layout.pipeline == 1
            hidden = min(seconds.get(GRADIENTS, 0.0), backward) if reduces else 0.0
            hidden += seconds.get(WEIGHTS, 0.0) if zero.stage == 3 and zero.prefetches else 0.0
            self.overlapped = min(hidden, compute)
