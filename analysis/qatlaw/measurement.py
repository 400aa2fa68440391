"""What counts as one measurement, for `fit`, `study plan`, results.csv and the folder of a study.

A recipe's keys fall into four groups:

- without effect on the result: names, folders, tracking, the layout on GPUs;
- known to laws: tokens, bit width, fraction, scheme, and the seed of a repeat;
- the optimizer's settings: they distinguish trials of one point, and the best trial counts;
- all others: they distinguish points, whether or not a law knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

WITHOUT_EFFECT = (
    "name", "output", "data.path", "checkpoint.", "tracking.", "log_interval", "engine.",
    "evaluation.interval", "evaluation.ptq_bits",
)  # fmt: skip
"""Prefixes of the keys without effect. The ds_config counts all the same, since it holds the precision."""
KNOWN_TO_LAWS = (
    "evaluation.", "batch.micro_batch", "n_params", "tokens", "seed", "init", "data.seed", "data.cooldown_seed",
    "qat.scheme", "qat.bits", "qat.fraction",
)  # fmt: skip
"""Prefixes of the keys that the final numbers, the seed and the held-out text stand for."""
TRIALS = (
    "optimizer.", "schedule.phases", "schedule.warmup_",
    "qat.learning_rate", "qat.lr_ratio", "qat.optimizer_state", "qat.scale_", "qat.warmup_",
)  # fmt: skip
"""Prefixes of the optimizer's keys: rates, betas, decay, eps, clipping, warm-ups, moments."""


MIXTURES = ("data.mix", "data.cooldown_mix")
"""Keys with a share for each source."""


def settings_with_effect(recipe: Mapping[str, str]) -> dict[str, str]:
    """The flat recipe of a run without the keys of `WITHOUT_EFFECT`; a ds_config is kept by its name.

    A mixture is one setting: it has other sources, and so other keys, in another run.
    """
    effective = {key: value for key, value in recipe.items() if not key.startswith(WITHOUT_EFFECT)}
    for mix in MIXTURES:
        shares = {key: effective.pop(key) for key in sorted(effective) if key.startswith(f"{mix}.")}
        if shares:
            listed = ", ".join(f"{key.removeprefix(f'{mix}.')}: {share}" for key, share in shares.items())
            effective[mix] = f"{{{listed}}}"
    if "engine.ds_config" in recipe:
        effective["engine.ds_config"] = PurePath(recipe["engine.ds_config"]).stem
    return effective


def split_settings(recipe: Mapping[str, str], scheme: str) -> tuple[dict[str, str], dict[str, str]]:
    """(settings that distinguish points, beside the numbers that a law knows; settings that distinguish trials)."""
    unused = ("qat.",) if scheme == "fp" else () if scheme == "sequential" else ("qat.cooldown_fraction",)
    used = {key: value for key, value in settings_with_effect(recipe).items() if not key.startswith(unused)}
    trial = {key: value for key, value in used.items() if key.startswith(TRIALS)}
    return {key: value for key, value in used.items() if not key.startswith((*TRIALS, *KNOWN_TO_LAWS))}, trial
