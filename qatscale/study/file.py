"""The study file: a grid of runs in YAML.

    name: small                       # of the study
    sizes:                            # recipes by name or path; a mapping changes one
      - 86m
      - {name: wide, recipe: quickstart, set: [model.hidden_size=128, model.heads=4]}
      - {name: large, recipe: 8b, processes: 8}
    set:                              # overrides of every run, as on the command line
      - data.path=data/corpus
    tokens_per_parameter: [20, 80]    # or tokens: [2.3B, 10B], the same for all sizes
    bits: [1, 2, 4]
    fractions: [0, 0.1, 0.3, 0.6, 1]  # QAT's share of the tokens
    schemes: [sequential, fused]      # of the fractions between 0 and 1
    seeds: [0, 1]                     # of weights and data order; nothing is shared between seeds
    vary:                             # any other keys of a recipe, all combinations
      qat.lr_ratio: [1, 0.5, 0.25]
    grids:                            # optional: the study is the union of these, each with its own values of the keys
      - {fractions: [0.05, 0.15]}     # above, where it has any
      - {sizes: [86m], seeds: [0, 1, 2]}

Fraction 0 is one full-precision run for all widths, evaluated after post-training quantization at each; 1 is QAT from
scratch at each width; all between are runs of each scheme at each width. Keys of `qat.` in `vary` do not apply to
full-precision runs. A cell whose schedule does not fit, such as a fused run with less QAT than cooldown, is left out
and reported. A study may grow: new values add runs, and the names of the others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlaw.bit_widths import BIT_WIDTHS, BIT_WIDTHS_TEXT
from qatscale.config import recipe_names
from qatscale.config.amounts import positive_amount
from qatscale.config.settings import settings, suggest
from qatscale.config.yaml_text import parse_yaml
from qatscale.errors import UserError, UserErrors, did_you_mean, nearest

TWO_PHASES = ("sequential", "fused")


@dataclass(frozen=True)
class Size:
    """A model of the grid."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    processes: int = 1
    """Processes that train one run: above 1 through the DeepSpeed launcher."""


@dataclass(frozen=True)
class Axes:
    """One grid: every combination of these values is a run."""

    sizes: tuple[Size, ...]
    tokens: tuple[int, ...]
    """The same for all sizes; empty where `tokens_per_parameter` says it."""
    tokens_per_parameter: tuple[float, ...]
    bits: tuple[float, ...]
    fractions: tuple[float, ...]
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]
    vary: tuple[tuple[str, tuple[Any, ...]], ...]
    """Dotted key and its values."""


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    overrides: tuple[str, ...]
    grids: tuple[Axes, ...]

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(dict.fromkeys(size for axes in self.grids for size in axes.sizes))


def read_study(path: Path) -> Study:
    """UserError, or all of them at once, for whatever is wrong with the file."""
    if not path.is_file():
        raise UserError("study", str(path), "no such file.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("study", str(path), f"cannot be read: {error}.") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError("study", str(path), "holds no `key: value` lines.")
    problems = [_unknown(str(key), _KEYS, "a study") for key in raw if key not in _KEYS]
    name = raw.get("name", path.stem)
    if not isinstance(name, str):
        problems.append(UserError("name", name, "a name."))
    overrides = _collected(problems, _items, raw, "set", _override, [])
    base = {key: value for key, value in raw.items() if key in _AXES}
    grids = raw.get("grids")
    if grids is None:
        axes = [_axes(base, "", problems)]
    elif not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
        problems.append(UserError("grids", grids, "a list of mappings.", f"For example: {_KEYS['grids']}."))
        axes = []
    else:
        axes = []
        for i, grid in enumerate(grids):
            unknown = [_unknown(f"grids[{i}].{key}", _AXES, "a grid") for key in grid if key not in _AXES]
            problems.extend(unknown)
            axes.append(_axes(_merged(base, grid), f"grids[{i}].", problems, own=grid))
    by_name: dict[str, Size] = {}
    for size in (size for one in axes for size in one.sizes):
        if by_name.setdefault(size.name, size) != size:
            problems.append(UserError("sizes", size.name, "two sizes of one name.", "Give each a name of its own."))
    if problems:
        # A key of the study itself is wrong in each of its grids: once is enough.
        several = list({str(problem): problem for problem in problems}.values())
        raise several[0] if len(several) == 1 else UserErrors(several)
    return Study(str(name), tuple(overrides), tuple(axes))


def _merged(base: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Any]:
    """A grid's own keys over the study's; its way to give tokens replaces the other one."""
    budget = {"tokens", "tokens_per_parameter"}
    dropped = budget if budget & grid.keys() else set()
    return {**{key: value for key, value in base.items() if key not in dropped}, **grid}


def _axes(raw: Mapping[str, Any], at: str, problems: list[UserError], own: Mapping[str, Any] | None = None) -> Axes:
    """`at`: prefix of the keys that `own`, a grid of several, gives itself."""

    def read(key: str, item: Callable[[str, Any], Any], default: Sequence[Any] | None = None) -> tuple[Any, ...]:
        named = f"{at}{key}" if own is None or key in own else key
        return _collected(problems, _items, raw, key, item, default, named)

    if "tokens" in raw and "tokens_per_parameter" in raw:
        do = "Keep one of them."
        problems.append(UserError(f"{at}tokens", None, "says the same thing as tokens_per_parameter.", do))
    if "tokens" not in raw and "tokens_per_parameter" not in raw:
        do = "Write tokens: [2.3B, 10B], or tokens_per_parameter: [20, 80]."
        problems.append(UserError(f"{at}tokens", None, "is missing.", do))
    return Axes(
        sizes=read("sizes", _size),
        tokens=read("tokens", positive_amount, []),
        tokens_per_parameter=read("tokens_per_parameter", _ratio, []),
        bits=read("bits", _bits),
        fractions=read("fractions", _fraction),
        schemes=read("schemes", _scheme, ["sequential"]),
        seeds=read("seeds", _seed, [0]),
        vary=_collected(problems, _vary, raw.get("vary", {}), f"{at}vary" if own and "vary" in own else "vary"),
    )


def _collected(problems: list[UserError], read: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    """What `read` returns, or nothing with its problems added to the list."""
    try:
        return read(*arguments)
    except UserErrors as several:
        problems.extend(several.problems)
    except UserError as problem:
        problems.append(problem)
    return ()


def _unknown(key: str, known: Mapping[str, str] | Sequence[str], what: str) -> UserError:
    return UserError(key, None, f"is no key of {what}.", did_you_mean(key.rpartition(".")[2], known))


def _items(
    raw: Mapping[str, Any],
    key: str,
    item: Callable[[str, Any], Any],
    default: Sequence[Any] | None,
    named: str | None = None,
) -> tuple[Any, ...]:
    """The values of a list; `named`: what errors call it."""
    named = named or key
    if key not in raw:
        if default is None:
            raise UserError(named, None, "is missing.", f"It is a list: {_KEYS[key]}.")
        return tuple(default)
    values = raw[key] if isinstance(raw[key], list) else [raw[key]]
    if not values:
        raise UserError(named, [], "is empty.", f"It is a list: {_KEYS[key]}.")
    found: list[Any] = []
    problems: list[UserError] = []
    for i, value in enumerate(values):
        try:
            read = item(f"{named}[{i}]", value)
        except UserError as problem:
            problems.append(problem)
            continue
        if read in found:
            problems.append(UserError(f"{named}[{i}]", value, "is there twice.", "Repeats are `seeds`."))
        found.append(read)
    if problems:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)
    return tuple(found)


def _vary(raw: Any, named: str) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if not isinstance(raw, dict):
        raise UserError(named, raw, "holds `key: [values]` lines.", f"For example: {_KEYS['vary']}.")
    found = []
    for key, values in raw.items():
        at = f"{named}.{key}"
        if key not in settings():
            raise UserError(at, None, "is no key of a recipe.", suggest(str(key)))
        _refuse_grid_key(at, str(key), None)
        listed = values if isinstance(values, list) else [values]
        if not listed:
            raise UserError(at, [], "is empty.", f"It is a list: {_KEYS['vary']}.")
        if len({repr(value) for value in listed}) < len(listed):
            raise UserError(at, listed, "has a value twice.", "Repeats are `seeds`.")
        found.append((str(key), tuple(listed)))
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
    processes = value.get("processes", 1)
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise UserError(f"{key}.processes", processes, "a whole number above 0.")
    overrides = _items(value, "set", _override, [], f"{key}.set")
    return Size(value["name"], _recipe(f"{key}.recipe", value["recipe"]), overrides, processes)


def _recipe(key: str, value: str) -> str:
    if value not in recipe_names() and not Path(value).is_file():
        raise UserError(key, value, "no such recipe or file.", did_you_mean(value, recipe_names()))
    return value


def _override(key: str, value: Any) -> str:
    if not isinstance(value, str) or "=" not in value:
        raise UserError(key, value, "an override, KEY=VALUE.", "`qatscale config` lists the keys.")
    _refuse_grid_key(key, value.partition("=")[0].strip(), value)
    return value


def _refuse_grid_key(key: str, name: str, value: str | None) -> None:
    if name in _GRID_KEYS:
        raise UserError(key, value, f"is the grid's to set: {name}.", f"Use the study's {_GRID_KEYS[name]}.")


def _ratio(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(key, value, "a number of tokens per parameter above 0: 20.")
    return float(value)


def _bits(key: str, value: Any) -> float:
    if isinstance(value, bool) or value not in BIT_WIDTHS:
        near = f" Nearest: {min(BIT_WIDTHS, key=lambda b: abs(b - value)):g}." if isinstance(value, int | float) else ""
        raise UserError(key, value, f"one of {BIT_WIDTHS_TEXT}.{near}")
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
    "vary": "{qat.lr_ratio: [1, 0.5]}",
    "grids": "[{bits: [2]}, {bits: [4], seeds: [0, 1]}]",
}
"""Keys of a study, with an example each."""
_AXES = [key for key in _KEYS if key not in ("name", "set", "grids")]
_SIZE_KEYS = ("name", "recipe", "set", "processes")
_GRID_KEYS = {
    "name": "name", "tokens": "tokens", "seed": "seeds", "data.seed": "seeds", "qat.scheme": "schemes",
    "qat.bits": "bits", "qat.fraction": "fractions", "evaluation.ptq_bits": "bits", "checkpoint.keep_at": "plan",
    "output": "folder",
}  # fmt: skip
"""What no override may set, and the key that does."""
