"""The files that describe a run, each read through one schema. Further keys are allowed: other versions wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qatscale.errors import UserError, first_invalid, first_line
from qatscale.files import read_json

Count = Annotated[int, Field(ge=0)]


class _File(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Parent(_File):
    name: str
    folder: str
    step: Count


class _Run(_File):
    name: str
    id: str
    created: Annotated[float, Field(allow_inf_nan=False)]
    parent: _Parent | None
    imported: str | None = None
    n_params: Count
    resolved: dict[str, Any] = {}


class _Segment(_File):
    phase: str
    start: Count
    end: Count
    quantized: bool


class _Timeline(_File):
    steps: Count
    tokens_per_step: Count
    switch_step: Count | None
    qat_lr_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    segments: list[_Segment]


class _Done(_File):
    step: Count
    metrics: dict[str, float | int | str | None]


class _Recipe(_File):
    data: dict[str, Any]
    qat: dict[str, Any]


_SCHEMAS: dict[str, type[_File]] = {
    "run.json": _Run, "timeline.json": _Timeline, "done.json": _Done, "recipe.yaml": _Recipe,
}  # fmt: skip


def read_run_file(path: Path) -> dict[str, Any]:
    """One of a run's files by its name. UserError, with file and key, where it is missing or damaged."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else read_json(path)
        _SCHEMAS[path.name].model_validate(content)
    except ValidationError as error:
        raise UserError("run", str(path), f"is damaged: {first_invalid(error)}.", "Restore the file.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        what = "is empty" if path.exists() and not path.stat().st_size else f"cannot be read: {first_line(error)}"
        raise UserError("run", str(path), f"{what}.", "Restore the file.") from None
    return dict(content)
