"""Our list of ds_config keys against the DeepSpeed that is installed, and our merged configs through its parser."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from collections.abc import Iterable
from typing import Any

import pytest
from deepspeed.runtime import config as ds_source
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero import offload_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from qatscale.config.ds_config import ds_config_names, load_ds_config, merge_ds_config
from qatscale.config.ds_keys import ACCEPTED, FORMER_NAMES, REPEATED, UNSUPPORTED, WITHOUT_EFFECT
from qatscale.config.recipe import load_run_config, recipe_names


class Asked(dict):
    """A dict that remembers which keys it was asked for, present or not."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # for `key in config.keys()`


def merged(recipe: str, ds_name: str) -> dict[str, Any]:
    return merge_ds_config(load_run_config(recipe), load_ds_config(ds_name), 1)


def top_level(keys: Iterable[str]) -> set[str]:
    return {key.partition(".")[0] for key in keys}


def test_deepspeed_reads_every_top_level_key_that_it_gets_and_we_know_all_that_it_reads() -> None:
    config = Asked(merged("debug", "zero1_bf16"))
    DeepSpeedConfig(config)
    assert top_level(ACCEPTED) - config.asked == set()
    assert config.asked - top_level([*ACCEPTED, *REPEATED, *WITHOUT_EFFECT, *UNSUPPORTED, *FORMER_NAMES]) == set()


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.offload_param", offload_config.DeepSpeedZeroOffloadParamConfig),
        ("bf16", DeepSpeedBF16Config),
    ],
)
def test_sections_are_in_step(section: str, model: Any) -> None:
    """Every key of DeepSpeed's is sorted, and no other key reaches it."""
    theirs = {field.alias or name for name, field in model.model_fields.items()}

    def within(keys: Iterable[str]) -> set[str]:
        return {key.removeprefix(f"{section}.").partition(".")[0] for key in keys if key.startswith(f"{section}.")}

    assert within(ACCEPTED) <= theirs
    assert theirs <= within([*ACCEPTED, *WITHOUT_EFFECT, *UNSUPPORTED])


def test_removed_features_are_refused() -> None:
    assert set(ds_source._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= UNSUPPORTED
    assert {f"zero_optimization.{key}" for key in ds_source._REMOVED_ZERO_CONFIG_KEYS} <= UNSUPPORTED


@pytest.mark.parametrize("ds_name", ds_config_names())
@pytest.mark.parametrize("recipe", recipe_names())
def test_deepspeed_accepts_every_merged_config_and_understands_it(recipe: str, ds_name: str) -> None:
    config = load_run_config(recipe)
    parsed = DeepSpeedConfig(merged(recipe, ds_name))
    assert parsed.train_batch_size == config.batch.sequences
    assert parsed.train_micro_batch_size_per_gpu == config.batch.micro_batch
    assert parsed.gradient_accumulation_steps == config.batch.sequences // config.batch.micro_batch
    assert parsed.gradient_clipping == config.optimizer.gradient_clipping
    assert parsed.zero_optimization_stage == int(ds_name[4])
    assert parsed.bfloat16_config.enabled == ("bf16" in ds_name)
    assert parsed.grad_accum_dtype == "fp32"
    assert str(parsed.communication_data_type) == "torch.float32"
    assert parsed.optimizer_name is None
    assert parsed.scheduler_name is None
