"""The system half of a run: a DeepSpeed JSON file, checked, and merged with the recipe into what DeepSpeed gets.

Files written for other stacks work as they are. "auto" is filled in, and a number that equals the recipe's is accepted.
A feature that is switched off is left out, and a key without effect is a warning. What contradicts the recipe or would
change the result is an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from qatlaw.files import without_duplicates
from qatscale.config.ds_keys import (
    ACCEPTED,
    FORMER_NAMES,
    INSTEAD,
    RECIPE_KEYS,
    REPEATED,
    UNSUPPORTED,
    WHY_NOT,
    WITHOUT_EFFECT,
)
from qatscale.config.places import named_file
from qatscale.config.problems import join, lookup, together
from qatscale.config.schema import RunConfig
from qatscale.config.section import describe
from qatscale.errors import SHOWN, UserError, did_you_mean
from qatscale.untrusted import read_object

_FOLDERS = (Path(__file__).parents[2] / "ds_configs", Path(__file__).with_name("ds_configs"))
"""Beside the package in a clone, inside it in a wheel."""

LARGEST = 1 << 20
"""Bytes of a file: each unknown key is compared with all known ones."""
NEVER = 1_000_000_000
"""Steps between DeepSpeed's own progress lines, which would repeat ours."""

_FROM_HIDDEN_SIZE = {  # as transformers' Trainer fills them (integrations/deepspeed.py)
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
_RULES = ACCEPTED | REPEATED
_SECTIONS = {key[:i] for key in _RULES for i, letter in enumerate(key) if letter == "."}


def ds_config_names() -> list[str]:
    """The ds_configs that come with qatscale."""
    return sorted(_shipped())


def load_ds_config(name_or_path: str | Path) -> dict[str, Any]:
    """A ds_config by name or path, for any recipe. Raises UserError naming every key that is wrong.

    Bucket sizes may still be "auto", and values that repeat the recipe's are not compared: see `run_ds_config`.
    """
    return _read(name_or_path).content


def run_ds_config(config: RunConfig) -> dict[str, Any]:
    """The ds_config that a recipe names, without "auto". Raises UserError where it contradicts the recipe."""
    return _fill(config, _read(config.engine.ds_config))


def corrected_ds_config(config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """The ds_config that a recipe names without what is wrong in it, and a sentence for everything left out."""
    check = _read(config.engine.ds_config, mend=True)
    filled = _fill(config, check)
    lost = [f"{problem.key}: {problem.problem}" for problem in check.problems]
    return filled, [*lost, *(f"{key}: has no effect." for key in check.without_effect)]


def ds_config_warnings(config: RunConfig, on_gpu: bool = False) -> tuple[str, ...]:
    """A sentence for each key without effect in a recipe's ds_config, and for fp32 on a GPU."""
    check = _read(config.engine.ds_config)
    warnings = [
        f"{key} in {check.source} has no effect" + (f": use {INSTEAD[key]}" if key in INSTEAD else "")
        for key in check.without_effect
    ]
    if on_gpu and precision_of(check.content) == "fp32":
        bf16 = f"engine.ds_config=zero{check.content['zero_optimization']['stage']}_bf16"
        warnings.append(f"{check.source} computes in fp32, which leaves a GPU's bf16 units idle: {bf16}")
    return tuple(warnings)


def precision_of(ds: Mapping[str, Any]) -> Literal["fp32", "bf16"]:
    """Precision of forward and backward; masters, moments and gradient accumulation are fp32 either way by default."""
    return "bf16" if ds.get("bf16", {}).get("enabled", False) else "fp32"


def merge_ds_config(config: RunConfig, ds: Mapping[str, Any], data_parallel: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: `ds` with the recipe's batch and clipping, and DeepSpeed's risky defaults set.

    data_parallel: processes that see different data. Raises UserError where the batch does not divide over them, or
    where `ds` contradicts the recipe.

    DeepSpeed's defaults that would change results unasked: clipping at 1.0; gradients accumulated and reduced in bf16,
    which also makes ZeRO 1 and 2 differ. `ds` may still ask for the bf16 reduction, at half the traffic.
    """
    check = _Check(ds, config.engine.ds_config)
    merged = _fill(config, check)
    sequences, micro_batch = config.batch.sequences, config.batch.micro_batch
    if sequences % (micro_batch * data_parallel):
        raise _does_not_divide(config, data_parallel)
    accumulation = config.batch.micro_batches(data_parallel)
    if merged.get("gradient_accumulation_steps", accumulation) != accumulation:
        ours = f"batch.sequences / (batch.micro_batch x data-parallel processes) = {accumulation}"
        raise check.contradiction("gradient_accumulation_steps", merged["gradient_accumulation_steps"], ours)
    merged["train_batch_size"] = sequences
    merged["train_micro_batch_size_per_gpu"] = micro_batch
    merged["gradient_accumulation_steps"] = accumulation
    merged["gradient_clipping"] = config.optimizer.gradient_clipping
    merged["data_types"] = {"grad_accum_dtype": "fp32", **merged.get("data_types", {})}
    merged.setdefault("communication_data_type", "fp32")
    # A breakdown is printed with the progress line, so asking for one asks for the line as well.
    merged.setdefault("steps_per_print", config.log_interval if merged.get("wall_clock_breakdown") else NEVER)
    if merged["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu":
        merged["zero_force_ds_cpu_optimizer"] = False  # else DeepSpeed refuses torch's AdamW under offload
    return merged


class _Check:
    """A ds_config sorted into keys with and without effect. UserError for what is wrong under any recipe.

    mend: collect in `problems` what is wrong, and leave it out.
    """

    def __init__(self, ds: Mapping[str, Any], source: str, mend: bool = False) -> None:
        self.source, self.mend = source, mend
        self.content: dict[str, Any] = {}
        self.without_effect: list[str] = []
        self.problems: list[UserError] = []
        self._sort(ds, "", self.content)
        zero = self.content.setdefault("zero_optimization", {})
        if "stage" not in zero and not self.problems:
            words = describe(ACCEPTED["zero_optimization.stage"])
            self._wrong("zero_optimization.stage", None, f"missing; it must be {words}.")
        zero.setdefault("stage", 1)
        if zero.get("stage") in (1, 2) and zero.get("offload_param", {}).get("device", "none") != "none":
            self._wrong("zero_optimization.offload_param", None, "needs stage 3, which shards parameters.")
            del zero["offload_param"]
        self.refuse()

    def refuse(self) -> None:
        """UserError for the problems found so far, unless they are to be mended."""
        if self.problems and not self.mend:
            *others, last = self.problems
            mend = (
                f"`qatscale config RECIPE engine.ds_config={self.source} --ds-config NEW.json` writes a corrected file."
            )
            raise together([*others, UserError(last.key, last.value, last.problem, join(last.fix, mend))])

    def contradiction(self, key: str, value: Any, ours: str) -> UserError:
        value = int(value) if isinstance(value, float) and value.is_integer() else value  # as it was written
        fix = f'Remove it or write "auto", or change the recipe. (In {self.source}.)'
        return UserError(key, value, f"the recipe says {ours}.", fix)

    def _wrong(self, key: str, value: Any, problem: str, fix: str = "") -> None:
        self.problems.append(UserError(key, value, problem, join(fix, f"(In {self.source}.)")))

    def _sort(self, section: Mapping[str, Any], prefix: str, content: dict[str, Any]) -> None:
        for written, value in section.items():
            key = FORMER_NAMES.get(prefix + written, prefix + written)
            name = key.removeprefix(prefix)
            if value is None or (key not in _RULES and key not in _SECTIONS and _is_off(value, key)):
                continue
            if key == "scheduler" and _left_open(value):
                self.without_effect.append(key)
            elif key in UNSUPPORTED:
                use = f", or use {INSTEAD[key]}" if key in INSTEAD else ""
                why = f": {WHY_NOT[key]}" if key in WHY_NOT else ""
                self._wrong(key, value, f"not supported by qatscale{why}.", f"Remove it, switch it off{use}.")
            elif key in WITHOUT_EFFECT:
                self.without_effect.append(key)
            elif key in _SECTIONS and isinstance(value, Mapping):
                self._sort(value, f"{key}.", content.setdefault(name, {}))
            elif key in _SECTIONS:
                self._wrong(key, value, 'must be a section: {"key": value}.')
            elif key not in _RULES:
                inside = (other for other in (*_RULES, *_SECTIONS) if other.startswith(prefix))
                known = [other for other in inside if "." not in other.removeprefix(prefix)]
                meant = did_you_mean(key, known) if len(self.problems) < SHOWN else ""  # it takes milliseconds
                self._wrong(key, None, "unknown key.", meant)
            elif value == "auto" and key == "bf16.enabled":
                content[name] = True  # such files are written for it
            elif value == "auto" and key not in REPEATED and name not in _FROM_HIDDEN_SIZE:
                continue  # DeepSpeed's default, as for DeepSpeed
            else:
                self._take(key, value, name, content)

    def _take(self, key: str, value: Any, name: str, content: dict[str, Any]) -> None:
        try:
            content[name] = _adapter(key).validate_python(value)
        except ValidationError:
            self._wrong(key, value, f"must be {describe(_RULES[key])}.")
        if content.get(name) == "bfp16":
            content[name] = "bf16"  # its former name


def _fill(config: RunConfig, check: _Check) -> dict[str, Any]:
    """The content of a checked ds_config, with every "auto" filled and without what the recipe says."""
    for key, recipe_key in RECIPE_KEYS.items():
        theirs = lookup(check.content, key.split("."))
        ours: Any = functools.reduce(getattr, recipe_key.split("."), config)
        if theirs not in (None, "auto", ours):
            check.problems.append(check.contradiction(key, theirs, f"{recipe_key} = {ours}"))
    check.refuse()
    filled = {name: dict(value) if isinstance(value, dict) else value for name, value in check.content.items()}
    for key in (*(key for key in RECIPE_KEYS if "." not in key), "optimizer"):
        filled.pop(key, None)
    filled.get("pipeline", {}).pop("stages", None)
    if filled.get("gradient_accumulation_steps") == "auto":
        del filled["gradient_accumulation_steps"]
    zero = filled["zero_optimization"]
    for name, size in _FROM_HIDDEN_SIZE.items():
        if zero.get(name) == "auto":
            zero[name] = size(config.model.hidden_size)
    return filled


def _is_off(value: Any, key: str) -> bool:
    """Whether a feature is switched off, or left to "auto", which means off here. Of an unknown key only
    "enabled": false counts: it may be a misspelling."""
    if isinstance(value, Mapping) and "enabled" in value:
        return value["enabled"] in (False, None, "auto")
    if key not in UNSUPPORTED | WITHOUT_EFFECT:
        return False
    if isinstance(value, Mapping):
        return all(_is_off(inner, key) for inner in value.values())
    return value in (None, False, "none", "auto", []) or (value is not True and value in (-1, 1))


def _left_open(scheduler: Any) -> bool:
    """Whether a scheduler leaves its settings to the recipe, as in the files for transformers' Trainer."""
    settings = scheduler.get("params") if isinstance(scheduler, Mapping) else None
    return isinstance(settings, Mapping) and len(settings) > 0 and _is_off(settings, "scheduler")


@functools.cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(_RULES[key])


def _does_not_divide(config: RunConfig, data_parallel: int) -> UserError:
    """The error with the nearest batch sizes and the micro-batch that divide."""
    sequences, micro = config.batch.sequences, config.batch.micro_batch
    per_pass = micro * data_parallel
    below, above = sequences // per_pass * per_pass, -(-sequences // per_pass) * per_pass
    fix = f"Nearest: batch.sequences={f'{below} or {above}' if below else above}"
    share, rest = divmod(sequences, data_parallel)
    if not rest:
        near = range(min(micro, share), max(0, min(micro, share) - 10_000), -1)
        fitting = next((m for m in near if share % m == 0), math.gcd(micro, share))
        fix += f"; or keep it and set batch.micro_batch={fitting}"
    return UserError(
        "batch.sequences",
        sequences,
        f"must be a multiple of batch.micro_batch x data-parallel processes = {micro} x {data_parallel} = {per_pass}.",
        f"{fix}.",
    )


def _shipped() -> dict[str, Path]:
    return {path.stem: path for folder in _FOLDERS for path in folder.glob("*.json")}


def _read(name_or_path: str | Path, mend: bool = False) -> _Check:
    path = named_file("engine.ds_config", name_or_path, _shipped())
    if path.stat().st_size > LARGEST:
        raise UserError("engine.ds_config", str(path), f"larger than {LARGEST >> 20} MB, which no ds_config is.")
    return _Check(read_object(path, "engine.ds_config", without_duplicates), str(path), mend)
