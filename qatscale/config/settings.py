"""Every key that a recipe or an override may set, with what it takes, its default and its meaning."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qatscale.config.schedule_section import Phase, PhaseOverride
from qatscale.config.schema import RunConfig
from qatscale.config.section import Section, describe
from qatscale.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One row of `qatscale config`."""

    key: str
    """Dotted, as an override writes it."""
    allowed: str
    default: str
    """As YAML writes it; 'required' where there is none."""
    meaning: str
    annotation: Any
    """The Python type, for readers of values."""


@functools.cache
def settings() -> dict[str, Setting]:
    """Dotted key -> setting, in the order of the schema; per-phase settings once for every phase."""
    return {setting.key: setting for setting in _walk(RunConfig, "")}


@functools.cache
def sections() -> frozenset[str]:
    """Dotted keys that hold other keys: 'schedule', 'schedule.phases.cooldown'..."""
    return frozenset(key.rsplit(".", depth)[0] for key in settings() for depth in range(1, key.count(".") + 1))


def explain(prefix: str = "") -> list[Setting]:
    """The settings at or under a dotted key; without one, all. Raises UserError for an unknown key."""
    rows = [s for key, s in settings().items() if not prefix or key == prefix or key.startswith(f"{prefix}.")]
    if not rows:
        raise UserError(prefix, None, "unknown key.", suggest(prefix))
    return rows


def suggest(key: str) -> str:
    """What the writer of an unknown key may have meant: a misspelling, or the same name in another section."""
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in [*settings(), *sections()] if k.rpartition(".")[0] == section}
    close = siblings.get(_most_alike(name, siblings, 0.75)) if siblings else _most_alike(key, settings(), 0.85)
    if not close:
        namesakes = [k for k in settings() if k.endswith(f".{name}") and ".phases." not in k]
        if len(namesakes) > 1:
            return f"Did you mean one of {', '.join(namesakes)}?"
        in_a_section = section and siblings
        close = namesakes[0] if namesakes else "" if in_a_section else _most_alike(key, settings(), 0.6)
    if close:
        return f"Did you mean {close!r}?"
    if in_a_section:
        return f"Known in {section}: {', '.join(siblings)}."
    return f"Known: {', '.join(dict.fromkeys(k.split('.')[0] for k in settings()))}."


def _most_alike(name: str, names: Iterable[str], cutoff: float) -> str:
    """The nearest of the names, "" where none is near."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), "")


def _walk(section: type[Section], prefix: str) -> list[Setting]:
    rows = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            rows += _walk(field.annotation, f"{key}.")
            continue
        rows.append(
            Setting(
                key=key,
                allowed=describe(field.annotation, field.metadata),
                default=_default(field),
                meaning=" ".join((field.description or "").split()),
                annotation=field.annotation,
            )
        )
        if key == "schedule.phases":
            for phase in get_args(Phase):
                rows += _walk(PhaseOverride, f"{key}.{phase}.")
    return rows


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or isinstance(field.default, bool | list | tuple | dict):
        return json.dumps(field.default)
    return f"{field.default:_}" if isinstance(field.default, int) else str(field.default)
