"""What the sections of recipes and study files have in common, and what their keys take, in words."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

LARGEST = 2**63 - 1
"""The largest size that torch counts to."""
KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top of a file to a value."""


class ClashError(ValueError):
    """A validator's finding where the type alone does not say what is wrong.

    key: the one to name, relative to the validated section or value; "" for itself.
    """

    def __init__(self, key: str, problem: str, fix: str = "") -> None:
        self.key, self.fix = key, fix
        super().__init__(problem)


class Section(BaseModel):
    """A mapping of known keys. Unknown ones are errors; a validated section does not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes True for 1, and `layers: true` for a model of one layer."""
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{value} is neither a number nor a text")
        return value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return value


NotBool = BeforeValidator(_not_bool)
"""For items of lists: Python takes True for 1."""


def _representable(value: int) -> int:
    if value > LARGEST:
        raise ClashError("", f"larger than {LARGEST:,}, the largest size that torch counts to")
    return value


Positive = Annotated[int, Field(gt=0), AfterValidator(_representable)]
Fraction = Annotated[float, NotBool, Field(ge=0, le=1)]
Beta = Annotated[float, NotBool, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Allowed:
    """Put into `Annotated[...]`: the words for a type whose annotation does not say enough."""

    words: str


def one_length(section: Section, name: str, fraction: str, tokens: str) -> None:
    """A length is a fraction or a number of tokens, never both. `name` is the section's own key."""
    if getattr(section, fraction) is not None and getattr(section, tokens) is not None:
        raise ClashError(
            tokens,
            f"gives the same length as {name}.{fraction} = {getattr(section, fraction):g}",
            f"Keep one: {name}.{fraction}=null or {name}.{tokens}=null.",
        )


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """The values that an annotation allows: `int` with `Gt(0)` -> 'a whole number above 0'."""
    marks = list(_flat(metadata))
    for mark in reversed(marks):  # the outermost words win
        if isinstance(mark, Allowed):
            return mark.words
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], [*arguments[1:], *marks])
    if origin is Literal:
        return _either([str(choice) for choice in arguments])
    if origin in (Union, types.UnionType):
        return _either([describe(part, marks) for part in arguments])
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    if origin in (list, tuple):
        return f"a list, each {describe(arguments[0])}"
    if origin is dict:
        return f"a section for any of {_either([str(key) for key in get_args(arguments[0])])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    if annotation in _PLAIN:
        return _PLAIN[annotation] + _range(marks)
    raise TypeError(f"no words for {annotation!r}; give it an Allowed(...)")


def members(annotation: Any) -> list[Any]:
    """The types that a value may have: those of a union, without their `Annotated`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return members(arguments[0])
    if origin in (Union, types.UnionType):
        return [member for part in arguments for member in members(part)]
    return [annotation]


def plain_types(annotation: Any) -> set[Any]:
    """The types and, of a Literal, the values that an annotation admits at its top level."""
    found: set[Any] = set()
    for member in members(annotation):
        origin = get_origin(member)
        found |= set(get_args(member)) if origin is Literal else {origin or member}
    return found


_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def _flat(metadata: Iterable[Any]) -> Iterable[Any]:
    """`Annotated[int, Field(gt=0)]` inside a union keeps its constraints one level down, in the FieldInfo."""
    for mark in metadata:
        if isinstance(mark, FieldInfo):
            yield from mark.metadata
        else:
            yield mark


def _range(marks: Iterable[Any]) -> str:
    low: Any = None
    bounds = []
    for mark in marks:
        match mark:
            case Gt(gt=bound):
                bounds.append(f"above {bound}")
            case Ge(ge=bound):
                low = bound
                bounds.append(f"of at least {bound}")
            case Lt(lt=bound):
                bounds.append(f"below {bound}")
            case Le(le=bound):
                bounds = [f"from {low} to {bound}"] if low is not None else [*bounds, f"at most {bound}"]
    return f" {' and '.join(bounds)}" if bounds else ""


def _either(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
