"""From pydantic's list of errors to lines that name the key, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from qatscale.config.describe import plain_types
from qatscale.config.schema import ClashError, Phase
from qatscale.config.settings import sections, settings, suggest
from qatscale.errors import UserError, UserErrors, nearest


def user_errors(error: ValidationError, raw: Mapping[str, Any], origin: Callable[[str], str]) -> UserError:
    """Every problem of a recipe, one line each.

    raw: the mapping that was validated. origin: dotted key -> a sentence on where it was set ('' for nowhere).
    """
    problems: dict[str, UserError] = {}
    for detail in error.errors(include_url=False):
        problem = _problem(detail, raw, origin)
        problems.setdefault(problem.key, problem)  # a union reports one error per member; one line tells them all
    if len(problems) == 1:
        return next(iter(problems.values()))
    return UserErrors(list(problems.values()))


def lookup(raw: Any, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return raw


def _problem(detail: Any, raw: Mapping[str, Any], origin: Callable[[str], str]) -> UserError:
    key, whole = _known_part(detail["loc"]), ".".join(str(part) for part in detail["loc"])
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ClashError):
        clashing = f"{key}.{cause.key}" if key else cause.key
        return UserError(clashing, lookup(raw, clashing), f"{cause}.", origin(clashing))
    if detail["type"] == "missing" and whole in settings():
        return UserError(whole, None, f"is missing; it takes {settings()[whole].allowed}.")
    if detail["type"] == "missing" and whole in sections():
        return UserError(whole, None, "is missing; it is a section.", f"See `qatscale config {whole}`.")
    if detail["type"] == "extra_forbidden":
        return UserError(whole, None, "is no key of a recipe.", _join(suggest(whole), origin(whole)))
    if key == "schedule.phases" and whole != key:
        phase = str(detail["loc"][2])
        return UserError(
            f"{key}.{phase}", None, f"is no phase; phases are {', '.join(_PHASES)}.", _meant(phase, _PHASES)
        )
    value = lookup(raw, key)
    if key not in settings():
        return UserError(key, value, "is a section, which holds `key: value` lines.", origin(key))
    setting = settings()[key]
    choices = [choice for choice in plain_types(setting.annotation) if isinstance(choice, str)]
    allowed = f"{'null; ' if value is None else ''}allowed is {setting.allowed}."
    return UserError(key, value, allowed, _join(_meant(value, choices), origin(key)))


_PHASES = get_args(Phase)


def _meant(value: object, choices: Iterable[str]) -> str:
    close = nearest(value, choices) if isinstance(value, str) else None
    return f"Did you mean {close!r}?" if close else ""


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _known_part(loc: tuple[int | str, ...]) -> str:
    """The dotted key inside pydantic's location, which goes on with list positions and union members."""
    key = ""
    for part in loc:
        longer = f"{key}.{part}" if key else str(part)
        if longer not in settings() and longer not in sections():
            break
        key = longer
    return key
