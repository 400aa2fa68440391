"""`qatscale plan`: the planner of qatlaw, with the recipes and GPUs that qatscale knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from qatlaw.cli import planner
from qatscale.errors import UserError

if TYPE_CHECKING:  # the planner's --help waits for no NumPy
    from qatlaw.plan.answer import Answer
    from qatlaw.plan.run import Recipe
    from qatlaw.plan.shapes import Shape

NEAR = 0.05
"""Relative difference of sizes up to which a recipe is named for a planned size."""


class RecipesAndGpus:
    """What the planner asks of its context."""

    def recipe(self, name: str, group_size: int | None) -> Recipe:
        from qatlaw.plan.run import SEQUENTIAL, Recipe, Scheme
        from qatscale.config.ds_config import precision_of, run_ds_config
        from qatscale.config.recipe import load_run_config, recipe_names
        from qatscale.config.schema import QatConfig
        from qatscale.config.short_runs import fit_lengths
        from qatscale.config.sizes import flops_per_token, stored_weights
        from qatscale.schedule.fraction import nearest_fraction

        config = load_run_config(name, [f"qat.group_size={group_size}"] if group_size else [])
        precision = precision_of(run_ds_config(config))
        two_phases = config
        if config.qat.scheme not in ("sequential", "fused"):
            two_phases = config.model_copy(update={"qat": config.qat.model_copy(update={"scheme": SEQUENTIAL.name})})

        def nearest(fraction: float, tokens: float) -> float:
            run = two_phases.model_copy(update={"tokens": round(tokens)})
            return nearest_fraction(fit_lengths(run, config, ["tokens"]) if name in recipe_names() else run, fraction)

        def stored_bytes(bits: float) -> float:
            return stored_weights(config.model, two_phases.qat.model_copy(update={"bits": bits}), precision).bytes

        weights = stored_weights(config.model, QatConfig())
        return Recipe(
            params=weights.params,
            non_embedding=weights.params - weights.embedding.weights,
            group=config.qat.group_size or config.model.hidden_size,
            tokens=config.tokens,
            bits=config.qat.bits,
            tokens_per_step=config.tokens_per_step,
            flops_per_token=flops_per_token(config.model, config.data.sequence_length),
            scheme=Scheme(two_phases.qat.scheme, nearest),
            stored_bytes=stored_bytes,
            model=f"recipe {name} in {precision}",
        )

    def file_size(self, name: str, group_size: int | None) -> Callable[[Shape, float], float]:
        """Bytes of the tensors in a format of exports."""
        from qatscale.export.formats import check_format
        from qatscale.export.sizes import tensor_bytes

        check_format(name)
        return lambda shape, bits: tensor_bytes(name, shape, bits, group_size)

    def peak_flops(self, gpu: str) -> float:
        from qatscale.config.sizes import known_peak

        return known_peak(gpu, "Or give its --peak-flops.")

    def runnable(self, answer: Answer, recipe: str | None) -> Answer:
        """With the recipe of the planned size, or for a planned shape the nearest one; `RECIPE` where none fits."""
        from qatscale.config.recipe import load_run_config, recipe_names
        from qatscale.config.sizes import count_parameters
        from qatscale.schedule.build import build_timeline

        overrides = answer.overrides
        if not overrides or "RECIPE" not in answer.command:
            return answer
        name = recipe
        if name is None:
            sizes = {name: count_parameters(load_run_config(name).model) for name in recipe_names()}
            off = {name: abs(math.log(size / answer.params)) for name, size in sizes.items()}
            name = min(off, key=lambda name: off[name])
            if off[name] > NEAR and not any(override.startswith("model.") for override in overrides):
                return answer
        try:
            build_timeline(load_run_config(name, overrides))
        except UserError:
            if recipe is not None:
                raise
            return answer
        return replace(answer, command=tuple(name if word == "RECIPE" else word for word in answer.command))


plan = copy(planner)
plan.info = copy(planner.info)
plan.info.context_settings = {"obj": RecipesAndGpus()}
