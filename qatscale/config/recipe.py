"""From a recipe file and dotted overrides to a validated RunConfig, and back to text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from qatscale.config.places import absolute_places, find_moved, named_file
from qatscale.config.problems import lookup, together, user_errors
from qatscale.config.schema import RunConfig
from qatscale.config.section import KeyPath, plain_types
from qatscale.config.settings import sections, settings, suggest
from qatscale.config.short_runs import fit_lengths
from qatscale.config.yaml_text import Document, parse_yaml, read_document, to_yaml
from qatscale.errors import UserError

RETIRED = ("data.shuffle_block", "engine.quantized_weight_cache")
"""Keys of former versions. They are dropped from recipes that runs recorded and refused in all others."""
_RECORDS = ("run.json", "qatscale.json")
"""Files beside a recipe that qatscale recorded, in a run folder or a universal checkpoint."""
RECIPES = Path(__file__).with_name("recipes")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_run_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe by name or path, with `dotted.key=value` overrides; of two overrides of one key the later one holds.

    Raises UserError for whatever is wrong with either, and lists all of it (UserErrors) where it can.
    """
    path = named_file("recipe", recipe, {name: RECIPES / f"{name}.yaml" for name in recipe_names()})
    document = _read(path)
    raw = document.value
    shipped = RunConfig.model_validate(raw) if path.parent == RECIPES else None
    recorded = any((path.parent / name).is_file() for name in _RECORDS)
    if recorded:
        _drop_retired(raw)
        raw.setdefault("init", 1)  # runs began to record it with version 2
        find_moved(raw, path.parent)
    given = _apply(raw, overrides)

    def origin(at: KeyPath) -> str:
        if any(at[: len(key)] == key for key in (tuple(key.split(".")) for key in given)):
            return "(Given on the command line.)"
        line = document.lines.get(at)
        return f"(Given in {path.name if path.parent == RECIPES else path}, line {line}.)" if line else ""

    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise user_errors(error, RunConfig, raw, origin, suggest) from error
    if recorded or shipped:
        config._given = given
    _refuse_idle_fraction(config, given)
    return fit_lengths(config, shipped, given) if shipped else config


def resolved_yaml(config: RunConfig) -> str:
    """The entire configuration with its defaults. Saved as a recipe, it loads back to an equal one."""
    return to_yaml(config.model_dump(mode="json"))


def recorded_yaml(config: RunConfig) -> str:
    """`resolved_yaml` with absolute paths, for a folder that is read from anywhere."""
    return to_yaml(absolute_places(config.model_dump(mode="json")))


def recipe_hash(path: Path) -> str:
    """SHA-256 of what a recipe file says. Comments, the order of keys and the spelling of numbers do not count.

    It needs no RunConfig: a later version, whose recipes have other keys and defaults, gets the same hash.
    """
    return _hash(_read(path).value)


def is_unaltered(path: Path, recorded: str) -> bool:
    """Whether a recipe file says what it said when `recipe_hash` was recorded, retired keys apart.

    True where the record is of another kind: version 0.1 recorded 16 digits.
    """
    raw = _read(path).value
    if len(recorded) != 64 or _hash(raw) == recorded:
        return True
    _drop_retired(raw)
    return _hash(raw) == recorded


def _hash(raw: Mapping[str, Any]) -> str:
    values = sorted(f"{key}: {value!r}" for key, value in _leaves(raw, ""))
    return hashlib.sha256("\n".join(values).encode()).hexdigest()


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> plain value (number, text, list, None), for tables and trackers."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


class Difference(NamedTuple):
    """One key that two configurations do not agree on; None where one of them does not set it."""

    key: str
    old: Any
    new: Any


def config_differences(old: RunConfig, new: RunConfig) -> list[Difference]:
    """What differs between two configurations, in the order of the schema."""
    before, after = flatten(old), flatten(new)
    return [
        Difference(key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _read(path: Path) -> Document:
    document = read_document(path, "recipe")
    if not document.value:
        names = ", ".join(recipe_names())
        raise UserError("recipe", str(path), "is empty.", f"Start from one that comes with qatscale: {names}.")
    return document


def _drop_retired(raw: dict[str, Any]) -> None:
    for key in RETIRED:
        section, _, name = key.rpartition(".")
        if isinstance(values := lookup(raw, section.split(".")), dict):
            values.pop(name, None)


def _refuse_idle_fraction(config: RunConfig, given: Sequence[str]) -> None:
    """Refuse a fraction from the command line that has no effect. A recipe may hold one for other schemes."""
    fixed = {"fp": 0.0, "scratch": 1.0}.get(config.qat.scheme)
    if "qat.fraction" in given and fixed is not None and config.qat.fraction not in ("auto", fixed):
        problem = f"has no effect: in scheme {config.qat.scheme!r} it is always {fixed:g}."
        raise UserError("qat.fraction", config.qat.fraction, problem, "Add qat.scheme=fused or qat.scheme=sequential.")


def _apply(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write the overrides into `raw`; returns their keys."""
    problems: list[UserError] = []
    given = []
    for override in overrides:
        try:
            key, value = _parse_override(override)
            _set(raw, key, value)
        except UserError as problem:
            problems.append(problem)
        else:
            given.append(key)
    if problems:
        raise together(problems)
    for key in given:  # a length on the command line replaces the recipe's, whichever of its two keys that has
        name, _, unit = key.rpartition("_")
        other = f"{name}_{'tokens' if unit == 'fraction' else 'fraction'}"
        if other in settings() and other not in given and key in settings():
            _set(raw, other, None)
    return given


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        fix = suggest(key) if key not in settings() else f"Write {key}=VALUE: {settings()[key].allowed}."
        raise UserError(override, None, "not an override, which reads key=value.", fix)
    if key in sections() and key not in settings():
        raise UserError(key, text, "is a section; set its keys one by one.", f"See `qatscale config {key}`.")
    if key not in settings():
        raise UserError(key, None, "unknown key.", suggest(key))
    if plain_types(settings()[key].annotation).isdisjoint({str, Path}):
        return key, parse_yaml(text, key)
    # A text is taken as it is: 2024 is a name, and `output=/data/x #1` holds no comment.
    return key, None if text in ("", "null") else text


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *path, name = key.split(".")
    at = raw
    for step, part in enumerate(path, start=1):
        inner = {} if at.get(part) is None else at[part]
        if not isinstance(inner, dict):
            section = ".".join(path[:step])
            raise UserError(section, inner, "is a section of `key: value` lines; the recipe gives it a single value.")
        at[part] = dict(inner)  # an alias elsewhere in the file may stand for the same section
        at = at[part]
    at[name] = value
