"""The files that describe a run, each read through one schema. Further keys are allowed: other versions wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qatlaw.errors import InputError, first_invalid
from qatlaw.files import Count, decode, read_small, without_duplicates

Number = Annotated[float, Field(allow_inf_nan=False)]


class _File(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Parent(_File):
    name: str
    folder: str
    step: Count


class _Run(_File):
    name: str
    id: str
    created: Number
    parent: _Parent | None
    imported: str | None = None
    n_params: Annotated[Count, Field(gt=0)]
    resolved: dict[str, Any] = {}


class _Segment(_File):
    phase: str
    start: Count
    end: Count
    quantized: bool


class _Timeline(_File):
    steps: Annotated[Count, Field(gt=0)]
    tokens_per_step: Count
    switch_step: Count | None
    qat_lr_ratio: Annotated[Number, Field(ge=0)] | None = None
    segments: list[_Segment]


class _Done(_File):
    step: Count
    metrics: dict[str, float | int | str | None]


class _Qat(_File):
    scheme: str
    bits: float


class _Tracking(_File):
    experiment: str
    uri: str | None = None


class _Recipe(_File):
    data: dict[str, Any]
    qat: _Qat
    tracking: _Tracking


_SCHEMAS: dict[str, type[_File]] = {
    "run.json": _Run, "timeline.json": _Timeline, "done.json": _Done, "recipe.yaml": _Recipe,
}  # fmt: skip


LONGEST_RECIPE = 1 << 20
"""Bytes of a recorded recipe. PyYAML reads some 100,000 a second."""


class _Plain(yaml.SafeLoader):
    """Without aliases, which qatscale never writes: a few lines of them can stand for any number of values."""

    def __init__(self, text: bytes) -> None:
        if len(text) > LONGEST_RECIPE:
            raise yaml.YAMLError(f"larger than {LONGEST_RECIPE >> 20} MB, which no recorded recipe is")
        super().__init__(text)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which no recorded recipe has")
        return super().compose_node(parent, index)


def read_run_file(path: Path) -> dict[str, Any]:
    """One of a run's files by its name. InputError, with file and key, where it is missing or damaged."""
    try:
        text = read_small(path)
        content = (
            yaml.load(text, _Plain)
            if path.suffix == ".yaml"
            else decode(json.loads(text, object_pairs_hook=without_duplicates))
        )
        _SCHEMAS[path.name].model_validate(content)
    except ValidationError as error:
        raise InputError("run", str(path), f"is damaged: {first_invalid(error)}.", "Restore the file.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        what = "is empty" if path.exists() and not path.stat().st_size else f"cannot be read: {reason}"
        raise InputError("run", str(path), f"{what}.", "Restore the file.") from None
    return dict(content)
