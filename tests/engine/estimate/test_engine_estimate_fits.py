"""Speed, host memory, what is refused and what is advised, against closed forms written down here."""

from __future__ import annotations

import re

import pytest

from qatscale.config.ds_config import load_ds_config
from qatscale.config.recipe import load_run_config, recipe_names
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters, device_memory, device_names, flops_per_token, peak_flops
from qatscale.engine.estimate.fits import Given, JobEstimate, network_advice, refuse_what_cannot_fit
from qatscale.engine.estimate.memory import LIBRARIES, ON_DEVICE
from qatscale.errors import UserError

ZERO1_BF16 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
H100 = "H100 80GB HBM3"


def config_of(*overrides: str, recipe: str = "86m") -> RunConfig:
    return load_run_config(recipe, overrides)


def test_speed_is_the_peak_over_the_arithmetic_with_the_bubble_and_the_network() -> None:
    config = config_of("engine.pipeline_stages=4", "engine.ds_config=zero1_bf16")
    job = JobEstimate(config, ZERO1_BF16, 8, Given("H200", 0.4))
    micro_batches = 256 // (16 * 2)
    arithmetic = 256 * 2048 * flops_per_token(config.model, 2048) / (0.4 * 989e12 * 8)
    assert job.bubble == 3 / (micro_batches + 3)
    assert job.compute_seconds == pytest.approx(arithmetic * (micro_batches + 3) / micro_batches)
    assert job.network.seconds == pytest.approx(sum(job.traffic.values()) / 400e9)
    assert job.network.overlapped == 0
    assert job.step_seconds == pytest.approx(job.compute_seconds + job.network.seconds)


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize(
    ("ds_config", "tensor", "sequence", "stages"),
    [
        *((name, 1, False, 1) for name in ("zero1_fp32", "zero1_bf16", "zero2_bf16_offload", "zero3_bf16")),
        ("zero2_bf16", 2, True, 1),
        ("zero3_fp32", 2, False, 1),
        ("zero1_bf16", 2, True, 2),
        ("zero1_fp32", 1, False, 2),
    ],
)
def test_every_recipe_on_every_layout(recipe: str, ds_config: str, tensor: int, sequence: bool, stages: int) -> None:
    overrides = [
        f"engine.tensor_parallel={tensor}", f"engine.sequence_parallel={str(sequence).lower()}",
        f"engine.pipeline_stages={stages}", f"engine.ds_config={ds_config}", "batch.micro_batch=1",
    ]  # fmt: skip
    shape = load_run_config(recipe).model
    if shape.heads % tensor:  # 3 heads do not split in two
        overrides += ["model.heads=2"]
    if (shape.kv_heads or shape.heads) % tensor:
        overrides += [f"model.kv_heads={tensor}"]
    overrides += [f"model.layers={max(shape.layers, stages)}"]
    config = load_run_config(recipe, overrides)
    job = JobEstimate(config, load_ds_config(ds_config), 4)
    assert len(job.stages) == stages
    for stage in job.stages:
        assert all(size >= 0 for size in stage.kinds.values())
        assert stage.total >= sum(stage.kinds[kind] for kind in ON_DEVICE) > 0
    assert job.fits is job.fits_host is job.step_seconds is None


# --- host memory ---


def test_host_memory_of_a_node() -> None:
    """8b on 64 processes, of which 8 share a node, which keeps its share of 12 bytes a parameter."""
    config = load_run_config("8b", ["qat.scheme=fp"])
    host = JobEstimate(config, load_ds_config("zero3_bf16"), 64).host
    parameters = count_parameters(config.model)
    assert host.processes == 8
    assert host.libraries == 8 * LIBRARIES
    assert host.checkpoint == pytest.approx(8 * 12 * parameters / 64, rel=1e-3)
    assert host.total == host.libraries + host.checkpoint
    waiting = JobEstimate(config_of("checkpoint.background=false"), ZERO1_BF16, 1).host
    assert waiting.checkpoint == waiting.offloaded == 0


def test_offloaded_state_is_on_the_host() -> None:
    """fp32 masters, two moments and gradients, and the weights on their way back in bf16: 18 bytes a parameter."""
    config = load_run_config("396m", ["checkpoint.background=false"])
    host = JobEstimate(config, load_ds_config("zero2_bf16_offload"), 8).host
    assert host.offloaded == pytest.approx(18 * count_parameters(config.model), rel=0.15)


def test_too_little_host_memory_is_refused_with_the_cure() -> None:
    config = load_run_config("396m", ["qat.scheme=fp"])
    ds = load_ds_config("zero1_bf16")
    needs = JobEstimate(config, ds, 1).host.total / 1e9
    refuse_what_cannot_fit(JobEstimate(config, ds, 1, Given(host_memory=1.01 * needs)))
    with pytest.raises(UserError, match=r"--host-memory.*Would fit: .*checkpoint\.background=false") as error:
        refuse_what_cannot_fit(JobEstimate(config, ds, 1, Given(host_memory=0.99 * needs)))
    without = JobEstimate(load_run_config("396m", ["qat.scheme=fp", "checkpoint.background=false"]), ds, 1)
    assert f"checkpoint.background=false ({without.host.total / 1e9:.3g} GB)" in str(error.value)


# --- what is refused ---


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    config, given = load_run_config("8b"), Given("A100-SXM4-40GB")
    ds = load_ds_config("zero1_bf16")
    with pytest.raises(
        UserError, match=r"has 40 GB; a process needs .* GB .* Would fit: .*engine.ds_config=zero3_bf16"
    ):
        refuse_what_cannot_fit(JobEstimate(config, ds, 64, given))
    fitting = load_ds_config("zero3_bf16")
    refuse_what_cannot_fit(JobEstimate(config, fitting, 64, given))


@pytest.mark.parametrize(
    ("given", "ds_config", "problem"),
    [
        (Given("h100"), "zero1_bf16", r"not known here.* Which one: H100 80GB HBM3, H100 NVL, H100 PCIe\?"),
        (Given(mfu=0.4), "zero1_bf16", "Name the device"),
        (Given("H200", 1.4), "zero1_bf16", "at most 1"),
        (Given("H200", 0.4), "zero1_fp32", "in fp32"),
        (Given(network=0), "zero1_bf16", "--network"),
        (Given(network=float("nan")), "zero1_bf16", "--network"),
        (Given(host_memory=-1), "zero1_bf16", "--host-memory"),
    ],
)
def test_a_wrong_device_or_number(given: Given, ds_config: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        JobEstimate(config_of(f"engine.ds_config={ds_config}"), load_ds_config(ds_config), 1, given)


def test_known_devices_have_a_peak_and_a_memory() -> None:
    for name in device_names():
        assert peak_flops(name)
        assert device_memory(name)
    assert device_memory("NVIDIA H100 80GB HBM3") == 80e9
    assert device_memory("NVIDIA H20") is None


# --- what the network asks for ---


def test_a_network_bound_run_is_told_which_change_helps() -> None:
    """Under ZeRO-3 every micro-batch gathers the weights and reduces the gradients: 16 sequences at a time instead of
    one send a 16th. The step that is promised is that of the changed run."""
    ds, given = load_ds_config("zero3_bf16"), Given(H100, 0.4)
    config = load_run_config("8b", ["batch.micro_batch=1", "engine.activation_checkpointing=true"])
    job = JobEstimate(config, ds, 64, given)
    assert job.network.seconds > job.compute_seconds > 0  # type: ignore[operator]
    advice = network_advice(job)
    assert advice is not None
    assert advice.startswith("bound by the network: batch.micro_batch=16 fits and sends 16 x less")
    changed = load_run_config("8b", ["batch.micro_batch=16", "engine.activation_checkpointing=true"])
    better = JobEstimate(changed, ds, 64, given)
    assert better.fits
    assert f"{better.step_seconds:.3g} s a step" in advice


def test_reducing_once_a_step_is_advised_where_it_fits() -> None:
    """ZeRO-2 reduces after each of 4 micro-batches, ZeRO-1 after the last. A slow link is hidden by neither."""
    config, ds = load_run_config("2p2b", ["batch.micro_batch=2"]), load_ds_config("zero2_bf16")
    advice = network_advice(JobEstimate(config, ds, 64, Given(H100, 0.4, network=10)))
    assert advice is not None
    assert re.search(r"engine\.ds_config=zero1_bf16 fits and sends 3\.\d x less", advice)


def test_a_fast_network_needs_no_advice() -> None:
    config, ds = load_run_config("8b"), load_ds_config("zero3_bf16")
    assert network_advice(JobEstimate(config, ds, 64, Given(H100, 0.4, network=1e6))) is None
    assert network_advice(JobEstimate(config, ds, 64, Given(H100))) is None, "its speed is unknown"
