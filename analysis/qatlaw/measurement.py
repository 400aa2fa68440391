"""What counts as one measurement, for `fit`, `study plan`, results.csv and the folder of a study.

A recipe's keys fall into four groups. Some touch no result: names, folders, tracking, the layout on GPUs. Some are what
a law knows: tokens, bit width, fraction, scheme, and the seed of a repeat. The optimizer's settings tell trials of one
point apart, of which the best one counts. All others tell points apart, whether a law knows them or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

WITHOUT_EFFECT = (
    "name", "output", "data.path", "checkpoint.", "tracking.", "log_interval", "engine.",
    "evaluation.interval", "evaluation.ptq_bits",
)  # fmt: skip
"""Beginnings of the keys that touch no result. The ds_config counts, since it holds the precision."""
KNOWN_TO_LAWS = (
    "evaluation.", "batch.micro_batch", "n_params", "tokens", "seed", "data.seed", "qat.scheme", "qat.bits",
    "qat.fraction",
)  # fmt: skip
"""Beginnings of the keys that the final numbers, the seed and the held-out text stand for."""
TRIALS = (
    "optimizer.", "schedule.phases", "schedule.warmup_",
    "qat.learning_rate", "qat.lr_ratio", "qat.optimizer_state", "qat.scale_", "qat.warmup_",
)  # fmt: skip
"""Beginnings of the optimizer's keys: rates, betas, decay, eps, clipping, warm-ups, moments."""


def settings_with_effect(recipe: Mapping[str, str]) -> dict[str, str]:
    """The flat recipe of a run without what differs from machine to machine. Of a ds_config the name stays."""
    effective = {key: value for key, value in recipe.items() if not key.startswith(WITHOUT_EFFECT)}
    if "engine.ds_config" in recipe:
        effective["engine.ds_config"] = PurePath(recipe["engine.ds_config"]).stem
    return effective


def trial_settings(recipe: Mapping[str, str], scheme: str) -> dict[str, str]:
    """What tells the trials of one point apart."""
    return {key: value for key, value in _used(recipe, scheme).items() if key.startswith(TRIALS)}


def point_settings(recipe: Mapping[str, str], scheme: str) -> dict[str, str]:
    """What tells points apart beside the numbers that a law knows."""
    return {key: value for key, value in _used(recipe, scheme).items() if not key.startswith((*TRIALS, *KNOWN_TO_LAWS))}


def _used(recipe: Mapping[str, str], scheme: str) -> dict[str, str]:
    """Without the keys that have no effect under the run's scheme."""
    unused = ("qat.",) if scheme == "fp" else () if scheme == "sequential" else ("qat.cooldown_fraction",)
    return {key: value for key, value in settings_with_effect(recipe).items() if not key.startswith(unused)}
