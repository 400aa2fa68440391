"""Memory in closed form, against formulas written down here and the model's own tensors."""

from __future__ import annotations

from typing import Any

import pytest

from qatscale.config.recipe import load_run_config, recipe_names
from qatscale.config.schema import QatConfig, RunConfig
from qatscale.config.sizes import count_parameters, stored_weights
from qatscale.engine.estimate.local_sizes import LocalSizes
from qatscale.engine.estimate.memory import Kinds, ZeroSettings, between_steps, fullest_moment, partition
from qatscale.engine.layout import Layout, stages_of
from qatscale.engine.layout_plan import plan_layout

ZERO1_BF16 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}


def config_of(*overrides: str, recipe: str = "86m") -> RunConfig:
    return load_run_config(recipe, overrides)


def sizes_of(config: RunConfig, layout: Layout, stage: int = 0) -> LocalSizes:
    return LocalSizes(config, layout, stages_of(config)[stage])


def peak(
    config: RunConfig, ds: dict[str, Any], processes: int = 1, stage: int = 0, *, quantized: bool = False
) -> tuple[str, Kinds]:
    layout = plan_layout(config, ds, processes)
    zero = ZeroSettings(ds, layout.data)
    return fullest_moment(sizes_of(config, layout, stage), zero, quantized=quantized)


# --- what a process holds ---


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tied_embedding=false", "model.kv_heads=1"],
        ["engine.tensor_parallel=2", "model.vocab_size=515"],
        ["engine.tensor_parallel=2", "model.head_dim=24", "model.attention_bias=true"],
        ["engine.pipeline_stages=2", "model.head_dim=48", "model.qk_norm=true"],
        ["engine.tensor_parallel=2", "qat.group_size=16", "qat.embedding_bits=8", "model.tied_embedding=false"],
        ["engine.pipeline_stages=2", "qat.bits=2"],
        ["engine.tensor_parallel=2", "engine.pipeline_stages=2", "qat.embedding_bits=16"],
    ],
)
def test_local_sizes_are_the_optimizer_groups_of_the_model(overrides: list[str]) -> None:
    from qatscale.model.llama import Llama
    from qatscale.model.tensor_parallel import TensorParallel
    from qatscale.quant.plugin import QatPlugin

    config = config_of(*overrides, recipe="debug")
    layout = Layout(1, config.engine.tensor_parallel, config.engine.pipeline_stages)
    for stage in stages_of(config):
        model = Llama(config.model, False, TensorParallel(0, layout.tensor), stage)
        plugin = QatPlugin(config.qat, 1)
        plugin.prepare(model)
        groups = {group["name"]: sorted(p.numel() for p in group["params"]) for group in plugin.optimizer_groups()}
        found = sizes_of(config, layout, stage.index).groups
        assert {name: sorted(group.elements()) for name, group in found.items()} == groups


@pytest.mark.parametrize("recipe", recipe_names())
def test_one_process_holds_the_entire_model(recipe: str) -> None:
    config = load_run_config(recipe)
    assert sizes_of(config, Layout()).weights == count_parameters(config.model)


def test_a_partition() -> None:
    """Four parameters of 5 elements on 3 processes: 20, padded to 24 by ZeRO-1, 8 each; ZeRO-3 pads each parameter."""
    zeros = (ZeroSettings({"zero_optimization": {"stage": stage}}, 3) for stage in (1, 3))
    assert [partition({5: 4}, zero) for zero in zeros] == [8, 4 * 2]


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
    held = between_steps(sizes_of(config, Layout(processes)), ZeroSettings(ds, processes))
    parameters = count_parameters(config.model)
    for kind, (each, divided) in {"weights": weight, "gradients": gradient, "optimizer": states}.items():
        assert held[kind] == pytest.approx(parameters * (each + divided / processes), rel=1e-4), kind  # type: ignore[index]


def test_offloaded_states_are_not_on_the_device() -> None:
    config = config_of()
    ds = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}}
    _, found = peak(config, ds, 2)
    assert found["optimizer"] == 0
    assert found["host"] >= 12 * count_parameters(config.model) / 2


# --- activations ---


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_activations_of_a_block(tensor: int, sequence: bool) -> None:
    """What one more block adds to the moment before backward, in bf16 with full attention, bytes a token:

    the stream before each norm and what the norms return 4·2D, 1/rms 2·4; and of the tensor-parallel share q, k, v,
    attended 4·2D, log-sum-exp 4h, gate, SiLU, up, product 4·2I. Under sequence parallelism the stream and 1/rms too.
    """
    overrides = [f"engine.tensor_parallel={tensor}", f"engine.sequence_parallel={str(sequence).lower()}"]
    blocks = [
        peak(config_of(*overrides, f"model.layers={layers}"), ZERO1_BF16, tensor)[1]["activations"] for layers in (8, 9)
    ]
    model = config_of().model
    tokens = 16 * 2048
    width, inner, heads = model.hidden_size, model.intermediate_size, model.heads
    split = tensor if sequence else 1
    per_token = (4 * width + 8) / split + 4 * width + (8 * width + 4 * heads + 8 * inner) / tensor
    assert blocks[1] - blocks[0] == tokens * per_token


def test_recomputing_keeps_the_input_of_a_block() -> None:
    (at, found), (also_at, other) = (
        peak(config_of("engine.activation_checkpointing=true", f"model.layers={layers}"), ZERO1_BF16)
        for layers in (8, 9)
    )
    assert at == also_at
    assert other["activations"] - found["activations"] == 16 * 2048 * 768 * 2


def test_qat_keeps_a_quantized_copy_of_every_block() -> None:
    (_, full), (_, quantized) = (peak(config_of(), ZERO1_BF16, quantized=on) for on in (False, True))
    assert full["quantized"] == 0
    block_weights = stored_weights(config_of().model, QatConfig()).matrices.weights
    assert quantized["quantized"] >= 2 * block_weights


def test_stages_keep_micro_batches_by_their_distance_from_the_end() -> None:
    """One forward, one backward: stage i of p keeps p - i micro-batches (arXiv 2104.04473, section 2.2)."""
    config = config_of("engine.pipeline_stages=4", "model.layers=16")
    kept = [peak(config, ZERO1_BF16, 4, stage)[1]["activations"] for stage in (1, 2)]
    blocks = [len(stage.blocks) for stage in stages_of(config)]
    assert kept[0] / blocks[1] / (kept[1] / blocks[2]) == pytest.approx(3 / 2, rel=0.05)


def test_any_number_of_layers_costs_the_same_arithmetic() -> None:
    """Everything of a block grows linearly: 2^60 blocks take 2^60 times what the 1,000th block adds."""
    few, more, most = (
        sum(peak(config_of(f"model.layers={layers}"), ZERO1_BF16)[1].values()) for layers in (1000, 1001, 2**60)
    )
    assert most == pytest.approx(few + (2**60 - 1000) * (more - few), rel=1e-6)
