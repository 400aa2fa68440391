"""Memory, traffic and speed of layouts on paper, against closed forms written down here and the model's tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from qatscale.config import load_run_config, recipe_names
from qatscale.config.ds_config import load_ds_config
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters, device_memory, device_names, flops_per_token, peak_flops
from qatscale.engine.dry_run.ledger import ON_DEVICE, Ledger
from qatscale.engine.dry_run.replay import Step
from qatscale.engine.dry_run.scale_plan import plan_scale, refuse_what_cannot_fit
from qatscale.engine.dry_run.share import share_of
from qatscale.engine.dry_run.traffic import traffic
from qatscale.engine.dry_run.zero_plan import partition, zero_plan
from qatscale.engine.layout import Layout, plan_layout, stages_of
from qatscale.errors import UserError

ZERO1_BF16 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}


def config_of(*overrides: str, recipe: str = "86m") -> RunConfig:
    return load_run_config(recipe, overrides)


def replayed(
    config: RunConfig, ds: dict[str, Any], processes: int = 1, stage: int = 0, *, quantized: bool = False
) -> Ledger:
    layout = plan_layout(config, ds, processes)
    share = share_of(config, layout, stages_of(config)[stage])
    return Step(config, layout, share, zero_plan(ds, layout.data), quantized=quantized).replay()


# --- what a process holds ---


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tied_embedding=false", "model.kv_heads=1"],
        ["engine.tensor_parallel=2", "model.vocab_size=515"],
        ["engine.tensor_parallel=2", "qat.group_size=16", "qat.embedding_bits=8", "model.tied_embedding=false"],
        ["engine.pipeline_stages=2", "qat.bits=2"],
        ["engine.tensor_parallel=2", "engine.pipeline_stages=2", "qat.embedding_bits=16"],
    ],
)
def test_a_share_is_the_optimizer_groups_of_the_model(overrides: list[str]) -> None:
    from qatscale.engine.initialize import optimizer_groups
    from qatscale.model.llama import Llama
    from qatscale.model.tensor_parallel import TensorParallel
    from qatscale.quant.plugin import QatPlugin

    config = config_of(*overrides, recipe="debug")
    layout = Layout(1, config.engine.tensor_parallel, config.engine.pipeline_stages)
    for stage in stages_of(config):
        model = Llama(config.model, False, TensorParallel(0, layout.tensor), stage)
        plugin = QatPlugin(config.qat, 1)
        plugin.prepare(model)
        groups = {group["name"]: [p.numel() for p in group["params"]] for group in optimizer_groups(model, plugin)}
        assert share_of(config, layout, stage).groups == groups


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_whole_model_on_one_process(recipe: str) -> None:
    config = load_run_config(recipe)
    assert share_of(config, Layout(), stages_of(config)[0]).weights == count_parameters(config.model).total


def test_a_partition_of_parameters_that_lie_across_cuts() -> None:
    """10 + 6 + 3 elements on 3 processes: 19, padded to 24, 8 each. The second has the end of the first parameter and
    all of the second; 16 elements of parameters, of which its largest piece is 6."""
    found = partition([10, 6, 3], 3)
    assert (found.size, found.whole, found.largest) == (8, 16, 6)


# --- memory ---


@pytest.mark.parametrize(
    ("ds", "weight", "gradient", "states"),
    [
        # bytes a parameter: (of each process, divided by the processes)
        ({"zero_optimization": {"stage": 1}}, (4, 0), (0, 0), (0, 12)),
        (ZERO1_BF16, (2, 0), (4, 0), (0, 12)),  # the bf16 optimizer's fp32 gradients stay
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, (2, 0), (0, 0), (0, 12)),
        ({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "bf16": {"enabled": True}},
         (0, 2), (0, 4), (0, 12)),
    ],
)  # fmt: skip
def test_what_zero_divides(
    ds: dict[str, Any], weight: tuple[int, int], gradient: tuple[int, int], states: tuple[int, int]
) -> None:
    config, processes = config_of(), 4
    held = replayed(config, ds, processes).held
    parameters = count_parameters(config.model).total
    for kind, (each, divided) in {"weights": weight, "gradients": gradient, "optimizer": states}.items():
        assert held[kind] == pytest.approx(parameters * (each + divided / processes), rel=1e-4), kind  # type: ignore[index]


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_activations_of_a_block(tensor: int, sequence: bool) -> None:
    """What one more block adds to the moment before backward, in bf16 with full attention, bytes a token:

    the stream before each norm and what the norms return 4·2D, 1/rms 2·4; and of the tensor-parallel share q, k, v,
    attended 4·2D, log-sum-exp 4h, gate, SiLU, up, product 4·2I. Under sequence parallelism the stream and 1/rms too.
    """
    overrides = [f"engine.tensor_parallel={tensor}", f"engine.sequence_parallel={str(sequence).lower()}"]
    blocks = [
        replayed(config_of(*overrides, f"model.layers={layers}"), ZERO1_BF16, tensor).peak["activations"]
        for layers in (8, 9)
    ]
    model = config_of().model
    tokens = 16 * 2048
    width, inner, heads = model.hidden_size, model.intermediate_size, model.heads
    split = tensor if sequence else 1
    per_token = (4 * width + 8) / split + 4 * width + (8 * width + 4 * heads + 8 * inner) / tensor
    assert blocks[1] - blocks[0] == tokens * per_token


def test_recomputing_keeps_the_input_of_a_block() -> None:
    blocks = [
        replayed(config_of("engine.activation_checkpointing=true", f"model.layers={layers}"), ZERO1_BF16)
        for layers in (8, 9)
    ]
    assert blocks[0].peak_at == blocks[1].peak_at
    assert blocks[1].peak["activations"] - blocks[0].peak["activations"] == 16 * 2048 * 768 * 2


def test_qat_keeps_a_quantized_copy_of_every_block() -> None:
    """At the loss; before that, in full precision, none."""
    full, quantized = (replayed(config_of(), ZERO1_BF16, quantized=on) for on in (False, True))
    assert full.peak["quantized"] == 0
    block_weights = count_parameters(config_of().model).matmul - 32_000 * 768
    assert quantized.peak["quantized"] >= 2 * block_weights


def test_stages_keep_micro_batches_by_their_distance_from_the_end() -> None:
    """One forward, one backward: stage i of p keeps p - i micro-batches (arXiv 2104.04473, section 2.2)."""
    config = config_of("engine.pipeline_stages=4", "model.layers=16")
    kept = [replayed(config, ZERO1_BF16, 4, stage).peak["activations"] for stage in (1, 2)]
    blocks = [len(stage.blocks) for stage in stages_of(config)]
    assert kept[0] / blocks[1] / (kept[1] / blocks[2]) == pytest.approx(3 / 2, rel=0.05)


def test_offloaded_states_are_not_on_the_device() -> None:
    config = config_of()
    ds = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}}
    found = replayed(config, ds, 2).peak
    assert found["optimizer"] == 0
    assert found["host"] >= 12 * count_parameters(config.model).total / 2


# --- traffic ---


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
def test_traffic_over_data(zero: dict[str, Any], expected: int) -> None:
    config = config_of("qat.scheme=fp", "batch.sequences=128", "model.tied_embedding=false")
    layout = Layout(data=4)
    found = traffic(config, layout, zero_plan({"zero_optimization": zero}, 4), quantized=False)
    ring = 3 / 4 * 4 * count_parameters(config.model).total
    assert sum(found.values()) == pytest.approx(expected * ring, rel=0.005)


def test_traffic_of_tensor_parallelism() -> None:
    """Megatron: two all-reduces of [b, t, D] a block forward, two backward; one for the embedding, one for the head."""
    config = config_of("engine.tensor_parallel=2", "qat.scheme=fp")
    found = traffic(config, Layout(1, 2), zero_plan(ZERO1_BF16, 1), quantized=False)
    tensor = 16 * 2048 * 768 * 2
    numbers = 16 * 2048 * 3 * 4  # of the loss
    assert found == {"activations over tensor": 16 * (2 * (4 * 8 + 2) * tensor // 2 + numbers)}


def test_traffic_between_stages_and_of_their_common_table() -> None:
    config = config_of("engine.pipeline_stages=3", "qat.scheme=fp")
    found = traffic(config, Layout(1, 1, 3), zero_plan(ZERO1_BF16, 1), quantized=False)
    assert found["stream between stages"] in (16 * 16 * 2048 * 768 * 2, 2 * 16 * 16 * 2048 * 768 * 2)
    if "tied table over stages" in found:  # of an end stage
        assert found["tied table over stages"] == 32_000 * 768 * 4


# --- speed, and what is refused ---


def test_speed_is_the_peak_over_the_arithmetic_less_the_bubble() -> None:
    config = config_of("engine.pipeline_stages=4", "engine.ds_config=zero1_bf16")
    plan = plan_scale(config, ZERO1_BF16, 8, "H200", 0.4)
    micro_batches = 256 // (16 * 2)
    arithmetic = flops_per_token(config.model, 2048)
    assert plan.bubble == 3 / (micro_batches + 3)
    assert plan.tokens_per_second == pytest.approx(0.4 * 989e12 * 8 / arithmetic * micro_batches / (micro_batches + 3))
    assert plan.step_seconds == pytest.approx(256 * 2048 / plan.tokens_per_second)


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
    if load_run_config(recipe).model.heads % tensor:  # 3 heads do not split in two
        overrides += ["model.heads=2"]
    config = load_run_config(recipe, overrides)
    plan = plan_scale(config, load_ds_config(ds_config), 4)
    assert len(plan.stages) == stages
    for stage in plan.stages:
        assert all(size >= 0 for size in stage.kinds.values())
        assert stage.total >= sum(stage.kinds[kind] for kind in ON_DEVICE) > 0
    assert plan.fits is None


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    config = load_run_config("8b")
    ds = load_ds_config("zero1_bf16")
    with pytest.raises(
        UserError, match=r"has 40 GB; a process needs .* GB .* Would fit: .*engine.ds_config=zero3_bf16"
    ):
        refuse_what_cannot_fit(config, ds, plan_scale(config, ds, 64, "A100-SXM4-40GB"))
    fitting = load_ds_config("zero3_bf16")
    refuse_what_cannot_fit(config, fitting, plan_scale(config, fitting, 64, "A100-SXM4-40GB"))


@pytest.mark.parametrize(
    ("gpu", "mfu", "ds_config", "told"),
    [
        ("H100", None, "zero1_bf16", "not known here"),  # SXM, PCIe or NVL
        (None, 0.4, "zero1_bf16", "Name the device"),
        ("H200", 1.4, "zero1_bf16", "at most 1"),
        ("H200", 0.4, "zero1_fp32", "in fp32"),
    ],
)
def test_a_wrong_device_or_share(gpu: str | None, mfu: float | None, ds_config: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan_scale(config_of(f"engine.ds_config={ds_config}"), load_ds_config(ds_config), 1, gpu, mfu)


def test_known_devices_have_a_peak_and_a_memory() -> None:
    for name in device_names():
        assert peak_flops(name)
        assert device_memory(name)
    assert device_memory("NVIDIA H100 80GB HBM3") == 80e9
    assert device_memory("NVIDIA H20") is None


# --- the command ---


def run(*arguments: str, then: str = "") -> subprocess.CompletedProcess[str]:
    code = f"from qatscale.cli import main\nimport sys\ntry:\n    main({list(arguments)!r})\nfinally:\n    pass; {then}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_dry_run_needs_neither_torch_nor_gpus() -> None:
    arguments = ("train", "8b", "--dry-run", "--processes", "64", "--json")
    done = run(*arguments, then="assert 'torch' not in sys.modules")
    assert "AssertionError" not in done.stderr
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["scale"]["processes"] == 64
    assert found["timeline"]["steps"] == 38_147


def test_the_dry_run_ends_with_2_where_it_does_not_fit() -> None:
    done = run("train", "2p2b", "--dry-run", "--gpu", "L4")
    assert done.returncode == 2
    assert "has 24 GB; a process needs" in done.stderr
    assert "fullest moment of a step" in done.stdout


def test_its_options_belong_to_it() -> None:
    done = run("train", "debug", "--gpu", "L4")
    assert done.returncode == 2
    assert "has no effect without --dry-run" in done.stderr
