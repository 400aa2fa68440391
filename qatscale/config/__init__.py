"""One RunConfig per run: a recipe and its overrides (the science), merged with a ds_config (the system)."""

from qatscale.config.recipe import (
    config_differences,
    flatten,
    is_unaltered,
    load_run_config,
    recipe_hash,
    recipe_names,
    recorded_yaml,
    resolved_yaml,
)
from qatscale.config.schema import RunConfig
from qatscale.config.settings import explain

__all__ = [
    "RunConfig",
    "config_differences",
    "explain",
    "flatten",
    "is_unaltered",
    "load_run_config",
    "recipe_hash",
    "recipe_names",
    "recorded_yaml",
    "resolved_yaml",
]
