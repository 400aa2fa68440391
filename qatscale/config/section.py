"""What the sections of recipes, study files and ds_configs have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

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
