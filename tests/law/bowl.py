"""Branches of the shipped cooldown study on a quadratic bowl, whose bias, variance and differences are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from qatlaw.cooldown import branches_of
from qatlaw.names import AVERAGED, FIRST_STEP, VAL_LOSS, VAL_LOSS_FP, VAL_LOSS_PTQ
from qatlaw.run_folders import flatten
from qatlaw.runs import RunRecord
from qatscale.config.schema import RunConfig
from qatscale.study.file import read_study
from qatscale.study.grid import grid

STUDY = Path(__file__).parents[2] / "analysis" / "studies" / "cooldown-1to1000" / "cooldown.yaml"
LOWEST, CURVATURE = 3.0, np.array([0.5, 2.0, 8.0])
BIAS = {"1-sqrt": 0.02, "lowered_linear": 0.01, "linear": 0.03, "1-square": 0.06, "piecewise": 0.025,
        "cosine": 0.035, "mirror_cosine": 0.04, "exponential": 0.05}  # fmt: skip
"""Distance of a shape's branches from the minimum, on each axis."""
SPREAD = {shape: 0.03 - 0.4 * (distance - 0.01) for shape, distance in BIAS.items()}
"""Standard deviation of the branches, on each axis: less bias, more variance."""


def loss_at(weights: np.ndarray) -> float:
    """weights: [3], from the minimum."""
    return LOWEST + 0.5 * float(weights @ (CURVATURE * weights))


def weights_of(config: RunConfig) -> np.ndarray:
    """Where a branch ends: [3]. The noise belongs to the order of the data, not to the settings."""
    schedule = config.schedule
    phase = schedule.phases.get("cooldown" if config.qat.scheme == "fp" else "qat_cooldown")
    betas = phase.betas if phase and phase.betas else config.optimizer.betas
    decay = phase.weight_decay if phase and phase.weight_decay is not None else config.optimizer.weight_decay
    distance = BIAS[schedule.shape] + 0.05 * abs(betas[1] - 0.95) + 0.02 * abs(betas[0] - 0.9) + 0.01 * abs(decay - 0.1)
    distance += 0.1 * abs((schedule.cooldown_fraction or 0) - 0.3) + 0.01 * abs(schedule.lowered_to - 0.7)
    distance += {2: 0.1, 4: 0.02}[config.qat.bits] if config.qat.scheme != "fp" else 0
    noise = np.random.default_rng(config.data.cooldown_seed).standard_normal(3)
    return distance + SPREAD[schedule.shape] * noise


def bowl_records(weights: Callable[[RunConfig], np.ndarray] = weights_of) -> list[RunRecord]:
    """A row for each run of the study, each average of its branches, and averages over the ends of uncooled runs."""
    runs = {run.route.name: run for run in grid(read_study(STUDY)).runs}
    records = []
    for name, run in runs.items():
        config, steps = run.config, run.timeline.steps
        own = loss_at(weights(config))
        final = {
            "scheme": config.qat.scheme, "bits": 16 if config.qat.scheme == "fp" else config.qat.bits,
            "n_params": 199_440, "tokens_total": run.timeline.tokens, "qat_fraction": run.timeline.qat_fraction,
            "tokens_fp": run.timeline.tokens * (1 - run.timeline.qat_fraction),
            "tokens_qat": run.timeline.tokens * run.timeline.qat_fraction, VAL_LOSS: own, VAL_LOSS_FP: own,
        }  # fmt: skip
        recipe = flatten(config.model_dump(mode="json")) | {"qat.fraction": str(run.timeline.qat_fraction)}
        records.append(RunRecord(name, name, "FINISHED", final, recipe, float(len(records))))
        for length in (2, 5, 10) if config.schedule.cooldown_fraction == 0 else ():
            average = {**final, VAL_LOSS: own - 0.002 * length, AVERAGED: length, FIRST_STEP: steps - 45 * (length - 1)}
            average[f"{VAL_LOSS_PTQ}{final['bits']}"] = own - 0.001 * length
            records.append(RunRecord(f"{name}-last{length}", f"{name}-last{length}", "FINISHED", average, recipe))
    for group in branches_of(records):
        first, steps = group[0], runs[group[0].name].timeline.steps
        middle = np.mean([weights(runs[record.name].config) for record in group], axis=0)
        if len(group) > 1:
            name = f"{first.name}-mean{len(group)}"
            final = {**first.final, VAL_LOSS: loss_at(middle), AVERAGED: len(group), FIRST_STEP: steps}
            records.append(RunRecord(name, name, "FINISHED", final, first.recipe))
    return records
