"""One RunConfig per run: a recipe and its overrides (the science), merged with a ds_config (the system)."""

from qatscale.config.ds_config import (
    ds_config_names,
    ds_config_warnings,
    load_ds_config,
    merge_ds_config,
    precision_of,
    run_ds_config,
)
from qatscale.config.recipe import (
    config_differences,
    flatten,
    is_unaltered,
    load_run_config,
    recipe_hash,
    recipe_names,
    resolved_yaml,
)
from qatscale.config.schema import RunConfig
from qatscale.config.settings import explain

__all__ = [
    "RunConfig",
    "config_differences",
    "ds_config_names",
    "ds_config_warnings",
    "explain",
    "flatten",
    "is_unaltered",
    "load_ds_config",
    "load_run_config",
    "merge_ds_config",
    "precision_of",
    "recipe_hash",
    "recipe_names",
    "resolved_yaml",
    "run_ds_config",
]
