"""The study file: a grid of runs in YAML, and the tree that covers it with the least training.

    name: small                       # of the study; its runs are named after their settings
    sizes:                            # recipes by name or path; a mapping changes one
      - 86m
      - {name: wide, recipe: quickstart, set: [model.hidden_size=128, model.heads=4]}
    set:                              # overrides of every run, as on the command line
      - data.path=data/corpus
    tokens_per_parameter: [20, 80]    # or tokens: [2.3B, 10B], the same for all sizes
    bits: [1, 2, 4]
    fractions: [0, 0.1, 0.3, 0.6, 1]  # QAT's share of the tokens
    schemes: [sequential, fused]      # of the fractions between 0 and 1
    seeds: [0, 1]                     # of weights and data order; nothing is shared between seeds

Fraction 0 is one full-precision run for all widths, evaluated after post-training quantization at each; 1 is QAT from
scratch at each width; all between are runs of each scheme at each width. A cell whose schedule does not fit, such as a
fused run with less QAT than cooldown, is left out and told.

The tree and its meaning are `qatlaw.study`'s; what a run prescribes at each step is its timeline's. So two runs share a
trunk exactly as long as `qatscale.timeline.first_difference` finds none: a warm-up that is a share of the tokens, and
not a number of them, parts runs of different length at the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlaw.study import Piece, Route
from qatscale.config import RunConfig, load_run_config, recipe_names
from qatscale.config.amounts import format_amount, positive_amount
from qatscale.config.schema import BIT_WIDTHS
from qatscale.config.yaml_text import parse_yaml
from qatscale.errors import UserError, UserErrors, did_you_mean, nearest
from qatscale.model.sizes import count_parameters, flops_per_token
from qatscale.timeline import Timeline, build_timeline
from qatscale.timeline.segments import Segment

TWO_PHASES = ("sequential", "fused")


@dataclass(frozen=True)
class Size:
    """A model of the grid."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    sizes: tuple[Size, ...]
    overrides: tuple[str, ...]
    tokens: tuple[int, ...]
    """The same for all sizes; empty where `tokens_per_parameter` says it."""
    tokens_per_parameter: tuple[float, ...]
    bits: tuple[float, ...]
    fractions: tuple[float, ...]
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class StudyRun:
    """One run of the grid."""

    config: RunConfig
    timeline: Timeline
    route: Route
    recipe: str
    overrides: tuple[str, ...]
    """That make `config` of the recipe."""


@dataclass(frozen=True)
class Grid:
    runs: tuple[StudyRun, ...]
    left_out: tuple[tuple[str, str], ...]
    """(run, why its schedule does not fit)."""
    warnings: tuple[str, ...]


def read_study(path: Path) -> Study:
    """UserError, or all of them at once, for whatever is wrong with the file."""
    if not path.is_file():
        raise UserError("study", str(path), "no such file.")
    raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise UserError("study", str(path), "holds no `key: value` lines.")
    problems: list[UserError] = []

    def read(key: str, item: Callable[[str, Any], Any], default: Sequence[Any] | None = None) -> tuple[Any, ...]:
        try:
            return _items(raw, key, item, default)
        except UserErrors as several:
            problems.extend(several.problems)
        except UserError as problem:
            problems.append(problem)
        return ()

    for key in raw:
        if key not in _KEYS:
            problems.append(UserError(str(key), None, "is no key of a study.", did_you_mean(str(key), _KEYS)))
    if "tokens" in raw and "tokens_per_parameter" in raw:
        do = "Keep one of them."
        problems.append(UserError("tokens", None, "says the same thing as tokens_per_parameter.", do))
    if "tokens" not in raw and "tokens_per_parameter" not in raw:
        do = "Write tokens: [2.3B, 10B], or tokens_per_parameter: [20, 80]."
        problems.append(UserError("tokens", None, "is missing.", do))
    name = raw.get("name", path.stem)
    if not isinstance(name, str):
        problems.append(UserError("name", name, "a name."))
    study = Study(
        name=str(name),
        sizes=read("sizes", _size),
        overrides=read("set", _override, []),
        tokens=read("tokens", positive_amount, []),
        tokens_per_parameter=read("tokens_per_parameter", _ratio, []),
        bits=read("bits", _bits),
        fractions=read("fractions", _fraction),
        schemes=read("schemes", _scheme, ["sequential"]),
        seeds=read("seeds", _seed, [0]),
    )
    names = [size.name for size in study.sizes]
    if len(set(names)) < len(names):
        problems.append(UserError("sizes", names, "two sizes of one name.", "Give each a name of its own."))
    if problems:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)
    return study


def grid(study: Study) -> Grid:
    """All runs of a study, in the order of its file. UserError where none has a schedule that fits."""
    runs: list[StudyRun] = []
    left_out: list[tuple[str, str]] = []
    for size in study.sizes:
        params = count_parameters(load_run_config(size.recipe, [*study.overrides, *size.overrides]).model).total
        budgets = study.tokens or tuple(round(params * ratio) for ratio in study.tokens_per_parameter)
        for seed in study.seeds:
            for tokens in budgets:
                for scheme, bits, fraction in _cells(study):
                    name = _run_name(study, size, tokens, scheme, bits, fraction, seed)
                    own = _own_overrides(study, name, tokens, scheme, bits, fraction, seed)
                    overrides = (*study.overrides, *size.overrides, *own)
                    config = load_run_config(size.recipe, overrides)
                    try:
                        timeline = build_timeline(config)
                    except UserError as problem:
                        left_out.append((name, str(problem)))
                        continue
                    route = _route(name, (size.name, seed), config, timeline)
                    runs.append(StudyRun(config, timeline, route, size.recipe, overrides))
    if not runs:
        raise UserError("study", study.name, f"none of its runs has a schedule that fits; the first: {left_out[0][1]}")
    return Grid(tuple(runs), tuple(left_out), _warnings(runs))


def _cells(study: Study) -> list[tuple[str, float | None, float]]:
    """(scheme, bits, fraction) of one size, budget and seed."""
    found: list[tuple[str, float | None, float]] = []
    for fraction in study.fractions:
        if fraction == 0:
            found.append(("fp", None, 0.0))
        else:
            schemes = ("scratch",) if fraction == 1 else study.schemes
            found += [(scheme, bits, fraction) for scheme in schemes for bits in study.bits]
    return found


def _run_name(
    study: Study, size: Size, tokens: int, scheme: str, bits: float | None, fraction: float, seed: int
) -> str:
    parts = [size.name, format_amount(tokens), scheme]
    if bits is not None:
        parts.append(f"{bits:g}bit")
    if scheme in TWO_PHASES:
        parts.append(f"f{fraction:g}")
    if len(study.seeds) > 1:
        parts.append(f"seed{seed}")
    return "-".join(parts)


def _own_overrides(
    study: Study, name: str, tokens: int, scheme: str, bits: float | None, fraction: float, seed: int
) -> list[str]:
    own = [f"name={name}", f"tokens={tokens}", f"seed={seed}", f"data.seed={seed}", f"qat.scheme={scheme}"]
    if bits is None:
        return [*own, f"evaluation.ptq_bits=[{', '.join(f'{b:g}' for b in study.bits)}]"]
    own.append(f"qat.bits={bits:g}")
    return [*own, f"qat.fraction={fraction:g}"] if scheme in TWO_PHASES else own


def _route(name: str, root: Hashable, config: RunConfig, timeline: Timeline) -> Route:
    pieces: list[Piece] = []
    for segment in timeline.segments:
        piece = Piece(_rule(segment, config), segment.start, segment.end)
        if pieces and pieces[-1].rule == piece.rule:
            piece = Piece(piece.rule, pieces.pop().start, piece.end)
        pieces.append(piece)
    flops = flops_per_token(config.model, config.data.sequence_length)
    return Route(name, root, tuple(pieces), timeline.tokens_per_step, float(flops))


def _rule(segment: Segment, config: RunConfig) -> Hashable:
    """Equal for segments that prescribe the same at the same step: a stable rate wherever it starts and ends, a warm-up
    or cooldown only from and to the same step. Before the switch the bit width does not matter."""
    quantized = config.qat.bits if segment.quantized else None
    settings = (segment.peak, segment.betas, segment.weight_decay, quantized)
    if segment.kind == "stable":
        return ("stable", *settings)
    shape = segment.cooldown if segment.kind == "cooldown" else None
    return (segment.kind, segment.start, segment.end, shape, *settings)


def _warnings(runs: Sequence[StudyRun]) -> tuple[str, ...]:
    lengths = {run.config.tokens for run in runs}
    in_shares = [run for run in runs if run.config.schedule.warmup_tokens is None]
    found = []
    if in_shares and (len(lengths) > 1 or any(run.config.qat.scheme == "sequential" for run in in_shares)):
        sizes = sorted({run.recipe for run in in_shares})
        found.append(
            f"the warm-up of {', '.join(sizes)} is a share of the tokens, so that runs of different length share "
            "nothing; give it in tokens: set schedule.warmup_tokens and schedule.warmup_fraction=null"
        )
    # That a recipe's own settings have no effect under a scheme of the grid is the grid's doing.
    seen = dict.fromkeys(warning for run in runs for warning in run.timeline.warnings if "no effect" not in warning)
    return (*found, *seen)


# --- reading ---


def _items(
    raw: Mapping[str, Any], key: str, item: Callable[[str, Any], Any], default: Sequence[Any] | None
) -> tuple[Any, ...]:
    if key not in raw:
        if default is None:
            raise UserError(key, None, "is missing.", f"It is a list: {_KEYS[key]}.")
        return tuple(default)
    values = raw[key] if isinstance(raw[key], list) else [raw[key]]
    if not values:
        raise UserError(key, [], "is empty.", f"It is a list: {_KEYS[key]}.")
    found: list[Any] = []
    problems: list[UserError] = []
    for i, value in enumerate(values):
        try:
            read = item(f"{key}[{i}]", value)
        except UserError as problem:
            problems.append(problem)
            continue
        if read in found:
            problems.append(UserError(f"{key}[{i}]", value, "is there twice.", "Repeats are `seeds`."))
        found.append(read)
    if problems:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)
    return tuple(found)


def _size(key: str, value: Any) -> Size:
    if isinstance(value, str):
        return Size(Path(value).stem, _recipe(key, value))
    if not isinstance(value, dict):
        raise UserError(key, value, "a recipe, or a mapping with name, recipe and set.")
    for part in value:
        if part not in _SIZE_KEYS:
            raise UserError(f"{key}.{part}", value[part], "is no key of a size.", did_you_mean(str(part), _SIZE_KEYS))
    for part in ("name", "recipe"):
        if not isinstance(value.get(part), str):
            raise UserError(
                f"{key}.{part}", value.get(part), "is missing or no text.", "A size has a name and a recipe."
            )
    return Size(value["name"], _recipe(f"{key}.recipe", value["recipe"]), _items(value, "set", _override, []))


def _recipe(key: str, value: str) -> str:
    if value not in recipe_names() and not Path(value).is_file():
        raise UserError(key, value, "no such recipe or file.", did_you_mean(value, recipe_names()))
    return value


def _override(key: str, value: Any) -> str:
    if not isinstance(value, str) or "=" not in value:
        raise UserError(key, value, "an override, KEY=VALUE.", "`qatscale config` lists the keys.")
    name = value.partition("=")[0].strip()
    if name in _GRID_KEYS:
        raise UserError(key, value, f"is the grid's to set: {name}.", f"Use the study's {_GRID_KEYS[name]}.")
    return value


def _ratio(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(key, value, "a number of tokens per parameter above 0: 20.")
    return float(value)


def _bits(key: str, value: Any) -> float:
    if isinstance(value, bool) or value not in BIT_WIDTHS:
        near = f" Nearest: {min(BIT_WIDTHS, key=lambda b: abs(b - value)):g}." if isinstance(value, int | float) else ""
        raise UserError(key, value, f"one of {', '.join(f'{b:g}' for b in BIT_WIDTHS)}.{near}")
    return float(value)


def _fraction(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        hint = f"Did you mean {value / 100:g}?" if isinstance(value, int | float) and 1 < value <= 100 else ""
        raise UserError(key, value, "a share of the tokens, 0 (full precision) to 1 (QAT from scratch).", hint)
    return float(value)


def _scheme(key: str, value: Any) -> str:
    if value in ("fp", "scratch"):
        raise UserError(key, value, "has no split.", f"Put {'0' if value == 'fp' else '1'} into fractions instead.")
    if value not in TWO_PHASES:
        close = nearest(str(value), TWO_PHASES)
        raise UserError(key, value, f"one of {', '.join(TWO_PHASES)}.", f"Did you mean {close!r}?" if close else "")
    return str(value)


def _seed(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(key, value, "a whole number.")
    return value


_KEYS = {
    "name": "small",
    "sizes": "[86m, 194m]",
    "set": "[data.path=data/corpus]",
    "tokens": "[2.3B, 10B]",
    "tokens_per_parameter": "[20, 80]",
    "bits": "[2, 4]",
    "fractions": "[0, 0.1, 0.3, 1]",
    "schemes": "[sequential, fused]",
    "seeds": "[0]",
}
"""Keys of a study, with an example each."""
_SIZE_KEYS = ("name", "recipe", "set")
_GRID_KEYS = {
    "name": "name", "tokens": "tokens", "seed": "seeds", "data.seed": "seeds", "qat.scheme": "schemes",
    "qat.bits": "bits", "qat.fraction": "fractions", "evaluation.ptq_bits": "bits", "checkpoint.keep_at": "plan",
}  # fmt: skip
"""What no override may set, and the key that does."""
