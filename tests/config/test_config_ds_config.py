"""ds_configs: what they may hold, where the rest belongs, and how they merge with a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from qatscale.config import load_run_config, recipe_names
from qatscale.config.ds_config import check_ds_config, ds_config_names, load_ds_config, merge_ds_config, precision_of
from qatscale.errors import UserError, UserErrors

ZERO1 = {"zero_optimization": {"stage": 1}}

# additions to ZERO1 -> the message
BAD_DS_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "train_batch_size": (
        {"train_batch_size": 8},
        "train_batch_size: belongs to the recipe, not to a ds_config. Set batch.sequences there.",
    ),
    "micro batch": (
        {"train_micro_batch_size_per_gpu": 8},
        "train_micro_batch_size_per_gpu: belongs to the recipe, not to a ds_config. Set batch.micro_batch there.",
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 8},
        "gradient_accumulation_steps: follows from the recipe: batch.sequences / (batch.micro_batch x data-parallel "
        "processes). Remove the key.",
    ),
    "optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        "optimizer: belongs to the recipe, not to a ds_config. "
        "Set optimizer.learning_rate, optimizer.betas, optimizer.eps and optimizer.weight_decay there.",
    ),
    "scheduler": (
        {"scheduler": {"type": "WarmupLR"}},
        "scheduler: belongs to the recipe, not to a ds_config. "
        "Set schedule.shape, schedule.warmup_fraction and schedule.cooldown_fraction there.",
    ),
    "clipping": (
        {"gradient_clipping": 1.0},
        "gradient_clipping: belongs to the recipe, not to a ds_config. Set optimizer.gradient_clipping there.",
    ),
    "checkpoint": (
        {"checkpoint": {"load_universal": True}},
        "checkpoint: would have no effect: qatscale writes its own checkpoints, free of the layout they were saved "
        "under. Set checkpoint.interval in the recipe.",
    ),
    "fp16": (
        {"fp16": {"enabled": True}},
        "fp16: is not supported: its loss scaling skips optimizer steps, and with them tokens and the planned switch; "
        'scales under 6e-5 lose bits in fp16. Write "bf16": {"enabled": true} instead.',
    ),
    "removed": ({"elasticity": {}}, "elasticity: DeepSpeed 0.19 has removed elastic training. Remove the key."),
    "unknown": (
        {"zero_optimisation": {"stage": 2}},
        "zero_optimisation: is no key of a ds_config. Did you mean 'zero_optimization'?",
    ),
    "unknown in a section": (
        {"bf16": {"enable": True}},
        "bf16.enable: is no key of a ds_config. Did you mean 'bf16.enabled'?",
    ),
    "stage 0": (
        {"zero_optimization": {"stage": 0}},
        "zero_optimization.stage = 0: Stages are 1 (optimizer state sharded), 2 (gradients too) and 3 (parameters "
        "too); 0 is refused: in bf16 it takes a hidden optimizer step before training, and it reports no gradient "
        "norm.",
    ),
    "text for a number": (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": "5e8"}},
        "zero_optimization.reduce_bucket_size = '5e8': allowed is a whole number of at least 1, without quotes.",
    ),
    "text for a flag": (
        {"bf16": {"enabled": "true"}},
        "bf16.enabled = 'true': allowed is true or false, without quotes.",
    ),
    "number for a flag": ({"bf16": {"enabled": 1}}, "bf16.enabled = 1: allowed is true or false, without quotes."),
    "flag for a section": ({"bf16": True}, 'bf16 = True: is a section: {"key": value}.'),
    "auto": (
        {"bf16": {"enabled": "auto"}},
        "bf16.enabled = 'auto': is filled in by Hugging Face's Trainer, and nobody here. Give a value.",
    ),
    "another dtype": (
        {"communication_data_type": "fp8"},
        "communication_data_type = 'fp8': allowed is fp32, bf16.",
    ),
    "bf16 masters": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads: QAT needs fp32 masters: a scale's updates are lost in bf16.",
    ),
    "NVMe": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.device = 'nvme': allowed is none, cpu.",
    ),
    "parameters offloaded but not sharded": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param: needs stage 3, which shards parameters.",
    ),
}


@pytest.mark.parametrize("name", BAD_DS_CONFIGS)
def test_a_bad_ds_config_prints(name: str, tmp_path: Path) -> None:
    additions, message = BAD_DS_CONFIGS[name]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ZERO1 | additions))
    with pytest.raises(UserError) as caught:
        load_ds_config(path)
    assert str(caught.value) == f"{message} (In {path}.)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: is no JSON"),
        ('{"bf16": {"enabled": true,}}', "line 1: is no JSON"),
        ("[]", "holds a list"),
        ('{"bf16": {}, "bf16": {}}', "bf16: occurs twice in the ds_config"),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": Infinity}}', "allowed is a whole number"),
        ('{"zero_optimization": {"stage": NaN}}', "Stages are 1"),
        ("{}", "zero_optimization.stage: is missing. Stages are 1"),
        ('{"zero_optimization": {}}', "zero_optimization.stage: is missing. Stages are 1"),
        ('{"zero_optimization": true}', "is a section"),
    ],
)
def test_a_bad_file_prints(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_ds_config(path)
    assert message in str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(UserErrors) as caught:
        check_ds_config({"train_batch_size": 1, "bf16": {"enabled": 3}, "zero_optimization": {"stage": 0}})
    assert [p.key for p in caught.value.problems] == ["train_batch_size", "bf16.enabled", "zero_optimization.stage"]


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
