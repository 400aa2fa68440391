"""What a process sends in an optimizer step, by arithmetic: bytes, for the stage that sends most.

Collectives are counted as rings send them (arXiv 1910.02054, section 7): of S bytes on N processes an all-gather and a
reduce-scatter send (N - 1)/N·S each, an all-reduce both. Which collectives there are is as the code calls them: in a
block `qatscale.model.tensor_parallel` (arXiv 2205.05198, section 4.2), at the end of a backward pass and of a step
DeepSpeed 0.19.8 (`runtime/zero`).
"""

from __future__ import annotations

from qatscale.config.schema import RunConfig
from qatscale.engine.dry_run.gathering import gathered
from qatscale.engine.dry_run.share import Share, share_of
from qatscale.engine.dry_run.zero_plan import FP32, ZeroPlan
from qatscale.engine.layout import Layout, stages_of

NUMBER = FP32
"""Bytes of one of the three numbers a token that the vocabulary-parallel loss exchanges."""


def _ring(size: int, processes: int) -> int:
    """An all-gather or a reduce-scatter whose whole is `size` bytes."""
    return size * (processes - 1) // processes


def traffic(config: RunConfig, layout: Layout, plan: ZeroPlan, *, quantized: bool) -> dict[str, int]:
    """Kind → bytes that a process sends a step. Kinds that there are none of are left out."""
    found = [
        traffic_of_stage(config, layout, share_of(config, layout, stage), plan, quantized=quantized)
        for stage in stages_of(config)
    ]
    most = max(found, key=lambda kinds: sum(kinds.values()))
    return {kind: size for kind, size in most.items() if size}


def traffic_of_stage(
    config: RunConfig, layout: Layout, share: Share, plan: ZeroPlan, *, quantized: bool
) -> dict[str, int]:
    """Of a process of one stage."""
    micro_batches = config.batch.sequences // (config.batch.micro_batch * layout.data)
    tokens = config.batch.micro_batch * config.data.sequence_length
    stream = tokens * share.width * plan.weight
    recompute = config.engine.activation_checkpointing
    return {
        "gradients over data": _gradients(share, plan, micro_batches, quantized=quantized),
        "weights over data": _weights(share, plan, micro_batches, recompute=recompute),
        "activations over tensor": micro_batches
        * _tensor(share, layout, stream, tokens, sequence=config.engine.sequence_parallel, recompute=recompute),
        "gradients over tensor": micro_batches
        * _shared(share, layout, plan, sequence=config.engine.sequence_parallel, quantized=quantized),
        "stream between stages": micro_batches * _stages(share, layout, stream, config.engine.sequence_parallel),
        "tied table over stages": _tied(config, share, layout, plan, quantized=quantized),
    }


def _gradients(share: Share, plan: ZeroPlan, micro_batches: int, *, quantized: bool) -> int:
    """ZeRO-1 and 2 all-reduce (`use_multi_rank_bucket_allreduce`), ZeRO-1 once a step, ZeRO-2 after every micro-batch;
    ZeRO-3 reduce-scatters after every micro-batch. The bf16 optimizer also sends the zeros of scales not in use."""
    scales = share.scales if quantized or plan.keeps_fp32_gradients else 0
    size = (share.weights + scales) * plan.reduced
    times = {1: 2, 2: 2 * micro_batches, 3: micro_batches}[plan.stage]
    return times * _ring(size, plan.data)


def _weights(share: Share, plan: ZeroPlan, micro_batches: int, *, recompute: bool) -> int:
    """ZeRO-1 and 2 gather the new weights once a step. ZeRO-3 gathers matrices in every micro-batch, once or more; what
    stays whole once a step."""
    if plan.stage < 3:
        return _ring((share.weights + share.scales) * plan.weight, plan.data)
    whole = sum(size for numels in share.groups.values() for size in numels if size <= plan.persists_up_to)
    return _ring((micro_batches * gathered(share, plan, recompute=recompute) + whole) * plan.weight, plan.data)


def _tensor(share: Share, layout: Layout, stream: int, tokens: int, *, sequence: bool, recompute: bool) -> int:
    """Of one micro-batch, in passes of a ring. A block sums its output twice forward and its input's gradient twice
    backward; under sequence parallelism each sum is a reduce-scatter and has an all-gather at the other end of its
    region. The embedding sums forward, the head backward.

    Recomputation stops at the last tensor that backward needs, before the MLP's sum.
    """
    block = 8 + ((3 if sequence else 2) if recompute else 0)
    ends = 2 * ((share.embed is not None) + (share.head is not None))
    loss = 2 * _ring(3 * NUMBER * tokens, layout.tensor) if share.head else 0
    return (block * share.blocks + ends) * _ring(stream, layout.tensor) + loss


def _shared(share: Share, layout: Layout, plan: ZeroPlan, *, sequence: bool, quantized: bool) -> int:
    """Of one micro-batch: gradients of parameters that all tensor-parallel processes hold and each sees a part of."""
    scales = sum(matrix.scales for matrix in share.matrices() if matrix.scales_shared) if quantized else 0
    norms = share.norms * share.width if sequence else 0
    return 2 * _ring((scales + norms) * plan.weight, layout.tensor)


def _stages(share: Share, layout: Layout, stream: int, sequence: bool) -> int:
    """Of one micro-batch: the stream on to the next stage, its gradient back.

    Between tensor-parallel stages DeepSpeed sends each process's part and gathers the rest there (`pipe_partitioned`,
    `grad_partitioned`); under sequence parallelism the stream is a part already.
    """
    ways = (not share.stage.is_first) + (not share.stage.is_last)
    part = stream // layout.tensor
    gather = 0 if sequence else _ring(stream, layout.tensor)
    return ways * (part + gather)


def _tied(config: RunConfig, share: Share, layout: Layout, plan: ZeroPlan, *, quantized: bool) -> int:
    """Once a step the first and the last stage sum the gradients of their common table."""
    table = share.embed or share.head
    if layout.pipeline == 1 or not config.model.tied_embedding or table is None:
        return 0
    scales = table.scales if quantized else 0
    return 2 * _ring((table.numel + scales) * (FP32 if plan.keeps_fp32_gradients else plan.weight), 2)
