"""One RunConfig per run: a recipe and its overrides (the science), merged with a ds_config (the system)."""
