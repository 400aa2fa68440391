"""ds_configs: what they may hold, where the rest belongs, and how they merge with a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from qatscale.config.ds_config import (
    corrected_ds_config,
    ds_config_names,
    ds_config_warnings,
    load_ds_config,
    merge_ds_config,
    precision_of,
    run_ds_config,
)
from qatscale.config.recipe import load_run_config, recipe_names
from qatscale.errors import UserError, UserErrors

ZERO1 = {"zero_optimization": {"stage": 1}}

# additions to ZERO1 -> the key that is named, and what the message must hold besides
BAD_DS_CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "schedule.cooldown_fraction")),
    "another optimizer": ({"optimizer": {"type": "Lion"}}, ("optimizer.type", "'Lion'", "AdamW")),
    "Adam with L2": ({"optimizer": {"params": {"adam_w_mode": False}}}, ("optimizer.params.adam_w_mode",)),
    "fp16": ({"fp16": {"enabled": True}}, ("fp16", '"bf16": {"enabled": true}')),
    "a removed feature": ({"elasticity": {"enabled": True}}, ("elasticity", "True")),
    "quantized gradients": (
        {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}},
        ("zero_optimization.zero_quantized_gradients",),
    ),
    "copies within a node": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        ("zero_optimization.zero_hpz_partition_size", "the switch to QAT computes with the weights from before it"),
    ),
    "AutoTP": ({"tensor_parallel": {"autotp_size": 2}}, ("tensor_parallel", "engine.tensor_parallel")),
    "unknown": ({"zero_optimisation": {"stage": 2}}, ("zero_optimisation", "'zero_optimization'")),
    "unknown and off": ({"bf16": {"enable": False}}, ("bf16.enable", "'bf16.enabled'")),
    "unknown and auto": ({"zero_optimization": {"stage": 1, "bucket": "auto"}}, ("zero_optimization.bucket",)),
    "stage 0": ({"zero_optimization": {"stage": 0}}, ("zero_optimization.stage", " 0:", "1 (", "2 (", "3 (")),
    "text for a number": (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": "5e8"}},
        ("zero_optimization.reduce_bucket_size", "'5e8'"),
    ),
    "too large a number": (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**400}},
        ("zero_optimization.reduce_bucket_size",),
    ),
    "text for a flag": ({"bf16": {"enabled": "true"}}, ("bf16.enabled", "'true'", "true or false")),
    "number for a flag": ({"bf16": {"enabled": 1}}, ("bf16.enabled", " 1:", "true or false")),
    "flag for a number": ({"steps_per_print": True}, ("steps_per_print", "True")),
    "flag for a section": ({"bf16": True}, ("bf16", "True", "section")),
    "another dtype": ({"communication_data_type": "fp8"}, ("communication_data_type", "'fp8'", "fp32, bf16")),
    "bf16 masters": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        ("bf16.bf16_master_weights_and_grads",),
    ),
    "NVMe": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        ("zero_optimization.offload_optimizer.device", "'nvme'", "none or cpu"),
    ),
    "parameters offloaded but not sharded": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        ("zero_optimization.offload_param", "stage 3"),
    ),
}


@pytest.mark.parametrize("name", BAD_DS_CONFIGS)
def test_a_bad_ds_config_is_named(name: str, tmp_path: Path) -> None:
    additions, (key, *facts) = BAD_DS_CONFIGS[name]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ZERO1 | additions))
    with pytest.raises(UserError) as caught:
        load_ds_config(path)
    assert caught.value.key == key
    assert [fact for fact in (str(path), *facts) if fact not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("{", "line 1"),
        ('{"bf16":\n {"enabled": true,}}', "line 2"),
        ("[]", "engine.ds_config"),
        ("[" * 100_000, "engine.ds_config"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "engine.ds_config"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' occurs twice"),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": Infinity}}', "zero_optimization.reduce_bucket_size"),
        ('{"zero_optimization": {"stage": NaN}}', "zero_optimization.stage"),
        ("{}", "zero_optimization.stage"),
        ('{"zero_optimization": {}}', "zero_optimization.stage"),
        ('{"zero_optimization": true}', "zero_optimization"),
    ],
)
def test_a_bad_file_is_named(text: str, fact: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_ds_config(path)
    assert fact in str(caught.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(UserErrors) as caught:
        merge_ds_config(
            CONFIG, {"fp16": {"enabled": True}, "bf16": {"enabled": 3}, "zero_optimization": {"stage": 0}}, 1
        )
    assert [p.key for p in caught.value.problems] == ["fp16", "bf16.enabled", "zero_optimization.stage"]


# --- ds_configs as other training stacks publish them ---

CONFIG = load_run_config("debug", ["batch.sequences=16", "batch.micro_batch=4"])
BATCH = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
FP16_AUTO = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
FROM_ELSEWHERE: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "axolotl, ZeRO-2": (
        {
            **BATCH, "bf16": {"enabled": "auto"}, "fp16": {**FP16_AUTO, "auto_cast": False},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
        },
        {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
        [],
    ),
    "axolotl, ZeRO-3": (
        {
            **BATCH, "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3, "sub_group_size": 0, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0, "stage3_gather_16bit_weights_on_model_save": True,
            },
        },
        {
            "stage": 3, "sub_group_size": 0, "reduce_bucket_size": 64 * 64,
            "stage3_prefetch_bucket_size": int(0.9 * 64 * 64), "stage3_param_persistence_threshold": 640,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        },
        ["zero_optimization.stage3_gather_16bit_weights_on_model_save"],
    ),
    "LLaMA-Factory, ZeRO-2": (
        {
            **BATCH, "zero_allow_untested_optimizer": True, "fp16": FP16_AUTO, "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8},
            "comms_config": {"verbose": False}, "monitor_config": {"enabled": True, "csv_monitor": {"enabled": False}},
        },
        {"stage": 2, "allgather_bucket_size": 500_000_000, "reduce_bucket_size": 500_000_000},
        ["zero_allow_untested_optimizer", "monitor_config"],
    ),
    "LLaMA-Factory, ZeRO-3": (
        {
            **BATCH, "zero_allow_untested_optimizer": True, "fp16": FP16_AUTO, "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": 3, "sub_group_size": 1e9, "reduce_bucket_size": "auto", "prefetch_bucket_size": "auto",
                "param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
                "gather_16bit_weights_on_model_save": True, "allgather_bucket_size": "auto",
            },
        },
        {
            "stage": 3, "sub_group_size": 10**9, "reduce_bucket_size": 64 * 64,
            "stage3_prefetch_bucket_size": int(0.9 * 64 * 64), "stage3_param_persistence_threshold": 640,
            "stage3_max_live_parameters": 10**9,
        },
        ["zero_allow_untested_optimizer", "zero_optimization.stage3_gather_16bit_weights_on_model_save"],
    ),
    "transformers, ZeRO-2": (
        {
            **BATCH, "fp16": FP16_AUTO, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
            "scheduler": {"type": "WarmupDecayLR", "params": {"last_batch_iteration": -1, "total_num_steps": "auto"}},
        },
        {"stage": 2},
        ["scheduler"],
    ),
    "Megatron-DeepSpeed, bf16": (
        {
            "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4,
            "gradient_clipping": 1.0, "steps_per_print": 1, "bfloat16": {"enabled": True, "loss_scale": 1.0},
            "fp16": {"enabled": False, "loss_scale": 0}, "zero_optimization": {"stage": 2},
            "optimizer": {"type": "Adam", "params": {"lr": 0.003, "betas": [0.9, 0.95], "weight_decay": 1e-1}},
            "data_types": {"grad_accum_dtype": "fp32"}, "prescale_gradients": False,
            "activation_checkpointing": {"partition_activations": True}, "communication_data_type": "bfp16",
            "curriculum_learning": {"enabled": False, "min_difficulty": 8}, "sparse_gradients": False,
            "a_feature_of_theirs": {"enabled": False},
        },
        {"stage": 2},
        ["activation_checkpointing"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROM_ELSEWHERE)
def test_a_ds_config_of_another_stack_works_as_it_is(name: str, tmp_path: Path) -> None:
    content, zero, without_effect = FROM_ELSEWHERE[name]
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(content))
    config = load_run_config("debug", ["batch.sequences=16", "batch.micro_batch=4", f"engine.ds_config={path}"])
    ds = run_ds_config(config)
    assert precision_of(ds) == "bf16"
    assert ds["zero_optimization"] == zero
    merged = merge_ds_config(config, ds, 1)
    assert '"auto"' not in json.dumps(merged)
    assert (merged["train_batch_size"], merged["gradient_accumulation_steps"]) == (16, 4)
    assert merged["gradient_clipping"] == 1
    assert not {"fp16", "optimizer", "bfloat16"} & set(merged)
    assert merge_ds_config(config, load_ds_config(path), 1) == merged
    warnings = ds_config_warnings(config, on_gpu=True)
    assert [warning.partition(" ")[0] for warning in warnings] == without_effect


@pytest.mark.parametrize(
    ("additions", "keys", "data_parallel"),
    [
        ({"train_batch_size": 8}, ["batch.sequences = 16"], 1),
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu = 8:", "batch.micro_batch = 4"], 1),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}}, ["scheduler = "], 1),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler = "], 1),
        ({"gradient_clipping": 0.5}, ["optimizer.gradient_clipping = 1.0"], 1),
        ({"optimizer": {"params": {"lr": 1e-4}}}, ["optimizer.learning_rate = 0.003"], 1),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, ["optimizer.betas = (0.9, 0.95)"], 1),
        ({"pipeline": {"stages": 2}}, ["engine.pipeline_stages = 1"], 1),
        ({"gradient_accumulation_steps": 4}, ["= 2"], 2),
        (
            {"train_batch_size": 8, "gradient_clipping": 2},
            ["batch.sequences = 16", "optimizer.gradient_clipping = 1.0"],
            1,
        ),
    ],
)
def test_a_value_that_contradicts_the_recipe_is_refused(
    additions: dict[str, Any], keys: list[str], data_parallel: int
) -> None:
    with pytest.raises(UserError) as caught:
        merge_ds_config(CONFIG, ZERO1 | additions, data_parallel)
    assert [key for key in keys if key not in str(caught.value)] == []
    assert next(iter(additions)) in caught.value.key


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match=r"'zero1-bf16': no ds_config or file of this name\. Did you mean 'zero1_bf16'"):
        load_ds_config("zero1-bf16")
    with pytest.raises(UserError, match="no such file"):
        load_ds_config("no/such.json")


def test_names_and_precisions() -> None:
    names = ds_config_names()
    assert {f"zero{stage}_{precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16")} <= set(names)
    for name in names:
        ds = load_ds_config(name)
        assert precision_of(ds) == ("bf16" if "bf16" in name else "fp32")
        assert ds["zero_optimization"]["stage"] == int(name[4])
        assert ("offload_optimizer" in ds["zero_optimization"]) == ("offload" in name)


@pytest.mark.parametrize("data_parallel", [1, 2])
@pytest.mark.parametrize("ds_name", ds_config_names())
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_merges_with_every_ds_config(recipe: str, ds_name: str, data_parallel: int) -> None:
    share = load_run_config(recipe).batch.sequences // data_parallel  # a recipe's micro-batch may be all of a step
    config, ds = load_run_config(recipe), load_ds_config(ds_name)
    if config.batch.micro_batch > share:
        config = load_run_config(recipe, [f"batch.micro_batch={share}"])
    merged = merge_ds_config(config, ds, data_parallel)
    assert merged["train_batch_size"] == config.batch.sequences
    assert (
        merged["train_micro_batch_size_per_gpu"] * merged["gradient_accumulation_steps"] * data_parallel
        == config.batch.sequences
    )
    assert merged["gradient_clipping"] == config.optimizer.gradient_clipping
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert merged["communication_data_type"] == "fp32"
    assert merged["steps_per_print"] > config.steps
    assert {key: merged[key] for key in ds} == ds
    assert json.loads(json.dumps(merged)) == merged


def test_merging_leaves_its_inputs_alone() -> None:
    ds = {**load_ds_config("zero2_bf16"), "data_types": {}}
    before = json.dumps(ds)
    merged = merge_ds_config(load_run_config("debug"), ds, 1)
    merged["data_types"]["grad_accum_dtype"] = merged["zero_optimization"]["stage"] = "changed"
    assert json.dumps(ds) == before


def test_a_ds_config_may_choose_the_dtype_of_reduction_and_accumulation() -> None:
    ds = ZERO1 | {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}, "steps_per_print": 5}
    merged = merge_ds_config(load_run_config("debug"), ds, 1)
    assert {key: merged[key] for key in ds} == ds


def test_no_clipping_is_said_aloud() -> None:
    config = load_run_config("debug", ["optimizer.gradient_clipping=0"])
    assert merge_ds_config(config, ZERO1, 1)["gradient_clipping"] == 0  # left out, DeepSpeed would clip at 1


def test_a_breakdown_is_printed_with_every_metrics_line() -> None:
    config = load_run_config("debug", ["log_interval=7"])
    assert merge_ds_config(config, ZERO1 | {"wall_clock_breakdown": True}, 1)["steps_per_print"] == 7


def test_offload_keeps_torchs_optimizer() -> None:
    config = load_run_config("debug")
    assert merge_ds_config(config, load_ds_config("zero2_bf16_offload"), 1)["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in merge_ds_config(config, ZERO1, 1)


@pytest.mark.parametrize(
    ("sequences", "micro", "data_parallel", "advice"),
    [
        (4, 1, 3, "Nearest: batch.sequences=3 or 6."),
        (4, 4, 2, "Nearest: batch.sequences=8; or keep it and set batch.micro_batch=2."),
        (12, 5, 2, "Nearest: batch.sequences=10 or 20; or keep it and set batch.micro_batch=3."),
        (96, 64, 1, "Nearest: batch.sequences=64 or 128; or keep it and set batch.micro_batch=48."),
    ],
)
def test_a_batch_that_does_not_divide(sequences: int, micro: int, data_parallel: int, advice: str) -> None:
    overrides = [f"batch.sequences={sequences}", f"batch.micro_batch={micro}"]
    with pytest.raises(UserError) as caught:
        merge_ds_config(load_run_config("debug", overrides), ZERO1, data_parallel)
    assert str(caught.value) == (
        f"batch.sequences = {sequences}: must be a multiple of batch.micro_batch x data-parallel processes = "
        f"{micro} x {data_parallel} = {micro * data_parallel}. {advice}"
    )
    for way in advice.replace(".", " ").replace(";", " ").split():
        if way.isdigit():  # every size offered does divide
            merge_ds_config(load_run_config("debug", [*overrides, f"batch.sequences={way}"]), ZERO1, data_parallel)


def test_a_corrected_file_holds_what_deepspeed_gets_and_loads(tmp_path: Path) -> None:
    theirs, mine = tmp_path / "theirs.json", tmp_path / "mine.json"
    theirs.write_text(json.dumps({
        **BATCH, "train_batch_size": 99, "fp16": {"enabled": True}, "bf16": {"enabled": "auto"}, "vocabulary_size": 99,
        "scheduler": {"type": "WarmupLR"}, "steps_per_print": "often",
        "zero_optimization": {"stage": 0, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu"}},
    }))  # fmt: skip
    with pytest.raises(UserError, match="--ds-config NEW"):
        load_ds_config(theirs)
    corrected, lost = corrected_ds_config(load_run_config("debug", [f"engine.ds_config={theirs}"]))
    assert corrected == {
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "reduce_bucket_size": 64 * 64},
    }  # fmt: skip
    assert [line.partition(":")[0] for line in lost] == [
        "fp16", "scheduler", "steps_per_print", "zero_optimization.stage", "zero_optimization.offload_param",
        "train_batch_size", "vocabulary_size",
    ]  # fmt: skip
    mine.write_text(json.dumps(corrected))
    assert load_ds_config(mine) == corrected
    for name, (ds, *_) in FROM_ELSEWHERE.items():
        theirs.write_text(json.dumps(ds))
        config = load_run_config("debug", [f"engine.ds_config={theirs}", "batch.sequences=16", "batch.micro_batch=4"])
        assert corrected_ds_config(config)[0] == run_ds_config(config), name
