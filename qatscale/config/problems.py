"""From pydantic's list of errors to messages that name the key, its value, what it takes and where it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from qatscale.config.section import ClashError, KeyPath, Section, describe, members, plain_types
from qatscale.errors import SHOWN, UserError, UserErrors, did_you_mean, nearest


def user_errors(
    error: ValidationError,
    model: type[Section],
    raw: Any,
    origin: Callable[[KeyPath], str],
    suggest: Callable[[str], str] | None = None,
) -> UserError:
    """Every problem of a file, one line each.

    raw: what was validated as `model`. origin: a sentence on where a value was set, "" if it is unknown. suggest: what
    the writer of an unknown dotted key may have meant; by default the nearest key of its section.
    """
    problems: dict[str, UserError] = {}

    def problem_of(detail: Any) -> UserError:
        place, kind = _place(model, detail["loc"]), detail["type"]
        path, rest = place.path, detail["loc"][len(place.path) :]
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ClashError):
            path = (*path, *cause.key.split(".")) if cause.key else path
            return UserError(dotted(path), lookup(raw, path), f"{cause}.", join(cause.fix, origin(path)))
        if kind == "extra_forbidden" or rest == ("[key]",):
            path = (*path, *rest) if kind == "extra_forbidden" else path
            meant = ""
            if len(problems) < SHOWN:  # a suggestion takes milliseconds
                meant = (
                    suggest(dotted(path)) if suggest else did_you_mean(str(path[-1]), _keys(_place(model, path[:-1])))
                )
            return UserError(dotted(path), None, "unknown key.", join(meant, origin(path)))
        if kind == "missing" and isinstance(path[-1], int):  # too few items: the list is wrong
            place = _place(model, path[:-1])
            path, kind = place.path, ""
        key, value = dotted(path), lookup(raw, path)
        if kind == "missing":
            return UserError(key, None, f"missing; it must be {describe(place.annotation, place.metadata)}.")
        choices = (choice for choice in plain_types(place.annotation) if isinstance(choice, str))
        close = nearest(value, choices) if isinstance(value, str) else None
        meant = f"Did you mean {close!r}?" if close else ""
        problem = f"{'null; it ' if value is None else ''}must be {describe(place.annotation, place.metadata)}."
        return UserError(key, value, problem, join(meant, origin(path)))

    for detail in error.errors(include_url=False):
        problem = problem_of(detail)
        problems.setdefault(problem.key, problem)  # a union reports an error per member; one line says it all
    return together(list(problems.values()))


def together(problems: Sequence[UserError]) -> UserError:
    """One error for one or several problems."""
    return problems[0] if len(problems) == 1 else UserErrors(problems)


def lookup(raw: Any, path: Iterable[str | int]) -> Any:
    """The value at a path, None if there is none. A single value may stand for the list or mapping it belongs in."""
    for part in path:
        if isinstance(raw, Mapping):
            raw = raw.get(part)
        elif isinstance(raw, Sequence) and not isinstance(raw, str) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
    return raw


def dotted(path: Iterable[str | int]) -> str:
    """`sizes[0].recipe`"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


@dataclass(frozen=True)
class _Place:
    """The part of pydantic's location that a reader knows; pydantic appends union members and the like."""

    path: KeyPath
    annotation: Any
    metadata: Sequence[Any]


def _place(model: type[Section], loc: Sequence[int | str]) -> _Place:
    annotation: Any = model
    metadata: Sequence[Any] = ()
    for i, part in enumerate(loc):
        inner = _inside(annotation, part)
        if inner is None:
            return _Place(tuple(loc[:i]), annotation, metadata)
        annotation, metadata = inner
    return _Place(tuple(loc), annotation, metadata)


def _inside(annotation: Any, part: int | str) -> tuple[Any, Sequence[Any]] | None:
    """Annotation and metadata of a part of a value."""
    for member in members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if origin in (list, tuple) and isinstance(part, int):
            return arguments[0], ()
        if origin is dict:
            return arguments[1], ()
        if isinstance(member, type) and issubclass(member, Section) and part in member.model_fields:
            field = member.model_fields[str(part)]
            return field.annotation, field.metadata
    return None


def _keys(place: _Place) -> Iterable[str]:
    for member in members(place.annotation):
        if isinstance(member, type) and issubclass(member, Section):
            return member.model_fields
        if get_origin(member) is dict and get_origin(get_args(member)[0]) is Literal:
            return get_args(get_args(member)[0])
    return ()
