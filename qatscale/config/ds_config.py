"""The system half of a run: a DeepSpeed JSON file, checked, and merged with the recipe into what DeepSpeed gets."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from qatscale.config.ds_keys import FLAG, TOP, Choice, Number, Refused, Whole
from qatscale.config.schema import RunConfig
from qatscale.errors import UserError, UserErrors, did_you_mean

_FOLDERS = (Path(__file__).parents[2] / "ds_configs", Path(__file__).with_name("ds_configs"))
"""In a clone beside the package, in a wheel inside it."""

NEVER = 1_000_000_000
"""Steps between DeepSpeed's own progress lines: ours say it already."""


def ds_config_names() -> list[str]:
    """The ds_configs that come along."""
    return sorted(_shipped())


def load_ds_config(name_or_path: str | Path) -> dict[str, Any]:
    """A ds_config by name or path. Raises UserError naming every key that is wrong, unknown or belongs elsewhere."""
    path = _path(name_or_path)
    ds = _read(path)
    check_ds_config(ds, str(path))
    return ds


def check_ds_config(ds: Mapping[str, Any], source: str = "ds_config") -> None:
    """Raise UserError for whatever a ds_config holds that DeepSpeed 0.19.8 or this project would not act on."""
    problems = list(_problems(ds, TOP, ""))
    zero = ds.get("zero_optimization")
    if not isinstance(zero, Mapping) or "stage" not in zero:
        problems.append(UserError("zero_optimization.stage", None, f"is missing. {_STAGES}"))
    elif zero.get("stage") in (1, 2) and "offload_param" in zero:
        problems.append(UserError("zero_optimization.offload_param", None, "needs stage 3, which shards parameters."))
    if problems:
        in_file = [UserError(p.key, p.value, p.problem, f"{p.fix} (In {source}.)".strip()) for p in problems]
        raise in_file[0] if len(in_file) == 1 else UserErrors(in_file)


def precision_of(ds: Mapping[str, Any]) -> Literal["fp32", "bf16"]:
    """Precision of forward and backward; masters, moments and gradient accumulation are fp32 either way by default."""
    return "bf16" if ds.get("bf16", {}).get("enabled", False) else "fp32"


def merge_ds_config(config: RunConfig, ds: Mapping[str, Any], data_parallel: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: `ds` with the recipe's batch and clipping, and DeepSpeed's risky defaults set.

    data_parallel: processes that see different data. Raises UserError where the batch does not divide over them.

    DeepSpeed's defaults that would change results unasked: clipping at 1.0; gradients accumulated and reduced in bf16,
    which also makes ZeRO 1 and 2 differ. `ds` may still ask for the bf16 reduction, at half the traffic.
    """
    check_ds_config(ds)
    per_pass = config.batch.micro_batch * data_parallel
    if config.batch.sequences % per_pass:
        raise _does_not_divide(config, data_parallel)
    merged = copy.deepcopy(dict(ds))
    merged["train_batch_size"] = config.batch.sequences
    merged["train_micro_batch_size_per_gpu"] = config.batch.micro_batch
    merged["gradient_accumulation_steps"] = config.batch.sequences // per_pass
    merged["gradient_clipping"] = config.optimizer.gradient_clipping
    merged["data_types"] = {"grad_accum_dtype": "fp32", **merged.get("data_types", {})}
    merged.setdefault("communication_data_type", "fp32")
    # A breakdown is printed with the progress line, so asking for one asks for the line as well.
    merged.setdefault("steps_per_print", config.log_interval if ds.get("wall_clock_breakdown") else NEVER)
    if ds["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu":
        merged["zero_force_ds_cpu_optimizer"] = False  # else DeepSpeed refuses torch's AdamW under offload
    return merged


_STAGES = (
    "Stages are 1 (optimizer state sharded), 2 (gradients too) and 3 (parameters too); 0 is refused: in bf16 it takes "
    "a hidden optimizer step before training, and it reports no gradient norm."
)


def _problems(section: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[UserError]:
    for name, value in section.items():
        key, rule = f"{prefix}{name}", known.get(name)
        if rule is None:
            allowed = [f"{prefix}{k}" for k, r in known.items() if not isinstance(r, Refused)]
            yield UserError(key, None, "is no key of a ds_config.", did_you_mean(key, allowed))
        elif isinstance(rule, Refused):
            yield UserError(key, None, rule.why, rule.do)
        elif value == "auto":
            yield UserError(key, value, "is filled in by Hugging Face's Trainer, and nobody here.", "Give a value.")
        elif isinstance(rule, dict):
            if not isinstance(value, Mapping):
                yield UserError(key, value, 'is a section: {"key": value}.')
            elif rule:
                yield from _problems(value, rule, f"{key}.")
        elif complaint := _mismatch(value, rule, key):
            yield UserError(key, value, complaint)


def _mismatch(value: Any, rule: Any, key: str) -> str:
    if rule is FLAG:
        return "" if isinstance(value, bool) else "allowed is true or false, without quotes."
    if isinstance(rule, Choice):
        return "" if value in rule.texts else f"allowed is {', '.join(rule.texts)}."
    assert isinstance(rule, Whole | Number)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(rule, Number):
        return "" if number and value >= rule.least else f"allowed is a number of at least {rule.least}."
    if number and value == int(value) and value >= rule.least and (rule.most is None or value <= rule.most):
        return ""
    if key == "zero_optimization.stage":
        return _STAGES
    return f"allowed is a whole number of at least {rule.least}, without quotes."


def _does_not_divide(config: RunConfig, data_parallel: int) -> UserError:
    """Says which batch sizes, and which micro-batches, would do."""
    sequences, micro, per_pass = (
        config.batch.sequences,
        config.batch.micro_batch,
        config.batch.micro_batch * data_parallel,
    )
    below, above = sequences // per_pass * per_pass, -(-sequences // per_pass) * per_pass
    do = f"Nearest: batch.sequences={f'{below} or {above}' if below else above}"
    share, rest = divmod(sequences, data_parallel)
    if not rest:
        near = range(min(micro, share), max(0, min(micro, share) - 10_000), -1)
        fitting = next((m for m in near if share % m == 0), math.gcd(micro, share))
        do += f"; or keep it and set batch.micro_batch={fitting}"
    return UserError(
        "batch.sequences",
        sequences,
        f"must be a multiple of batch.micro_batch x data-parallel processes = {micro} x {data_parallel} = {per_pass}.",
        f"{do}.",
    )


def _shipped() -> dict[str, Path]:
    return {path.stem: path for folder in _FOLDERS for path in folder.glob("*.json")}


def _path(name_or_path: str | Path) -> Path:
    if str(name_or_path) in _shipped():
        return _shipped()[str(name_or_path)]
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    what = (
        "no such file."
        if path.suffix == ".json" or os.sep in str(name_or_path)
        else "no ds_config or file of this name."
    )
    raise UserError("engine.ds_config", str(name_or_path), what, did_you_mean(path.stem, ds_config_names()))


def _read(path: Path) -> dict[str, Any]:
    try:
        ds = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}", None, f"is no JSON: {error.msg}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("engine.ds_config", str(path), f"cannot be read: {error}.") from error
    if not isinstance(ds, dict):
        raise UserError(
            "engine.ds_config", str(path), f"holds a {type(ds).__name__}, not an object of keys and values."
        )
    return ds


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(key, None, "occurs twice in the ds_config; the later one would win.", "Keep one.")
        found[key] = value
    return found
