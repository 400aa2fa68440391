"""Traffic and its time, against counts and sums written down here."""

from __future__ import annotations

from typing import Any

import pytest

from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters
from qatscale.engine.estimate.local_sizes import LocalSizes
from qatscale.engine.estimate.memory import ZeroSettings
from qatscale.engine.estimate.traffic import BETWEEN, INSIDE, NetworkTime, Traffic, traffic_of
from qatscale.engine.layout import Layout, stages_of

ZERO1_BF16 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}


def config_of(*overrides: str) -> RunConfig:
    return load_run_config("86m", ["qat.scheme=fp", *overrides])


def sent(config: RunConfig, layout: Layout, ds: dict[str, Any], stage: int = 0) -> Traffic:
    sizes = LocalSizes(config, layout, stages_of(config)[stage])
    found = traffic_of(sizes, ZeroSettings(ds, layout.data), quantized=False)
    return {kind: size for kind, size in found.items() if size}


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        # of n parameters in fp32 on 4 processes, 2 micro-batches a step: 3/4 of 4n bytes a pass of a ring
        ({"stage": 1}, 2 + 1),  # all-reduce once, gather the new weights
        ({"stage": 2}, 2 * 2 + 1),  # all-reduce every micro-batch
        # reduce-scatter and gather every micro-batch, once for forward and once for backward: ZeRO's own 3
        ({"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}, 2 * (1 + 2)),
        ({"stage": 3}, 2 * (1 + 1)),  # 110M elements are kept from forward to backward
    ],
)
def test_over_data(zero: dict[str, Any], expected: int) -> None:
    config = config_of("batch.sequences=128", "model.tied_embedding=false")
    found = sent(config, Layout(data=4), {"zero_optimization": zero})
    ring = 3 / 4 * 4 * count_parameters(config.model)
    assert sum(found.values()) == pytest.approx(expected * ring, rel=0.005)


def test_of_tensor_parallelism() -> None:
    """Megatron: two all-reduces of [b, t, D] a block forward, two backward; one for the embedding, one for the head."""
    found = sent(config_of("engine.tensor_parallel=2"), Layout(1, 2), ZERO1_BF16)
    tensor = 16 * 2048 * 768 * 2
    numbers = 16 * 2048 * 3 * 4  # of the loss
    assert found == {"activations over tensor": 16 * (2 * (4 * 8 + 2) * tensor // 2 + numbers)}


def test_between_stages_and_of_their_common_table() -> None:
    """The stream forward and its gradient backward, one of each a micro-batch and neighbour; the end stages all-reduce
    the gradient of their common table in fp32."""
    config = config_of("engine.pipeline_stages=3")
    stream, table = 16 * 16 * 2048 * 768 * 2, 32_000 * 768 * 4
    assert sent(config, Layout(1, 1, 3), ZERO1_BF16, stage=1) == {"stream between stages": 2 * stream}
    for end in (0, 2):
        expected = {"stream between stages": stream, "tied table over stages": table}
        assert sent(config, Layout(1, 1, 3), ZERO1_BF16, stage=end) == expected


# --- time ---

GB = 10**9
SENT = {"gradients over data": 100 * GB, "weights over data": 60 * GB, "activations over tensor": 40 * GB}


def timed(layout: Layout, ds: dict[str, Any], compute: float | None, bandwidth: float | None = None) -> Any:
    return NetworkTime(
        SENT, layout, ZeroSettings(ds, layout.data), bandwidth=bandwidth, compute=compute, micro_batches=4,
        recomputes=False,
    )  # fmt: skip


def test_links_by_the_span_of_a_group() -> None:
    """16 ranks are two nodes of 8: tensor-parallel groups of 4 stay inside one, data-parallel ones do not."""
    across = timed(Layout(4, 4), ZERO1_BF16, None)
    assert across.seconds == pytest.approx(160 / BETWEEN + 40 / INSIDE)
    assert timed(Layout(2, 4), ZERO1_BF16, None).seconds == pytest.approx(200 / INSIDE)
    assert timed(Layout(4, 4), ZERO1_BF16, None, 25.0).seconds == pytest.approx(160 / 25 + 40 / INSIDE)
    assert timed(Layout(2, 4), ZERO1_BF16, None, 25.0).seconds == pytest.approx(200 / 25)


@pytest.mark.parametrize(
    ("zero", "bf16", "compute", "overlapped"),
    [
        # at 50 GB/s gradients take 2 s, weights 1.2 s; backward is two thirds of the arithmetic
        ({"stage": 3}, True, 9.0, 2.0 + 1.2),  # DeepSpeed overlaps by default in ZeRO-3
        ({"stage": 3, "overlap_comm": False}, True, 9.0, 1.2),
        ({"stage": 3, "overlap_comm": False, "stage3_prefetch_bucket_size": 0}, True, 9.0, 0.0),
        ({"stage": 3}, True, 1.5, 1.5),  # never more than the arithmetic
        ({"stage": 2, "overlap_comm": True}, True, 1.5, 1.0),
        ({"stage": 2}, True, 9.0, 0.0),
        ({"stage": 1, "overlap_comm": True}, False, 6.0, 1.0),  # behind the last of 4 micro-batches
        ({"stage": 1, "overlap_comm": True}, True, 9.0, 0.0),  # DeepSpeed's BF16_Optimizer reduces at the end
    ],
)
def test_what_the_engine_overlaps(zero: dict[str, Any], bf16: bool, compute: float, overlapped: float) -> None:
    ds = {"zero_optimization": zero} | ({"bf16": {"enabled": True}} if bf16 else {})
    found = timed(Layout(16), ds, compute, 50.0)
    assert found.overlapped == pytest.approx(overlapped)
    assert found.seconds == pytest.approx(160 / 50 + 40 / INSIDE)
