"""`fit.json`: a fitted law with its intervals, the range and hash of its runs, and its quality.

Somebody who plans by a law must see what stands behind it, so nothing of it is optional but the intervals.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qatlaw.errors import InputError
from qatlaw.intervals import Bootstrap
from qatlaw.laws import law_from_dict
from qatlaw.laws.base import Law, LawForm

if TYPE_CHECKING:
    from qatlaw.fit import FitResult

FORMAT = 1


@dataclass(frozen=True)
class FitFile:
    """What a fit.json holds."""

    law: Law
    intervals: dict[str, tuple[float, float]]
    """By coefficient; empty without a bootstrap."""
    bootstrap: Bootstrap | None
    """The resampled laws, for intervals of whatever a plan asks."""
    range: dict[str, tuple[float, float]]
    """(low, high) of the runs: n_params, tokens, bits, s_total."""
    data: dict[str, Any]
    """hash, runs, sizes, source, left_out, and synthetic: whether the runs were drawn from a made-up law."""
    quality: dict[str, Any]
    """r2, mae, sigma, per_bits, warnings, and fraction_mae where U-curves were measured."""
    created: str

    def outside(self, **amounts: float) -> list[str]:
        """Which of the amounts (named as in `range`) lie outside the runs' range, in words."""
        told = []
        for name, value in amounts.items():
            low, high = self.range.get(name, (-math.inf, math.inf))
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                told.append(f"{name} = {value:.4g} (the law's runs: {low:.4g} to {high:.4g})")
        return told


def fit_file(result: FitResult, bootstrap: Bootstrap | None = None, **quality: Any) -> FitFile:
    """What of a fit goes into its file. `quality`: further measures, e.g. fraction_errors as dictionaries."""
    return FitFile(
        law=result.law,
        intervals=bootstrap.coefficients if bootstrap else {},
        bootstrap=bootstrap,
        range=result.table.ranges,
        data={
            "hash": result.table.hash,
            "runs": len(result.table),
            "sizes": sorted(set(result.table.column("n_params").tolist())),
            "source": result.table.source,
            "left_out": result.left_out,
            "synthetic": result.table.synthetic,
        },
        quality={
            "r2": result.r2,
            "mae": result.mae,
            "sigma": result.quality.sigma,
            "per_bits": {bits: vars(found) for bits, found in result.per_bits.items()},
            "standard_errors": result.certainty.parameters,
            "noise": {"own": result.noise.own, "trunk": result.noise.trunk if result.noise.trunk_is_known else None},
            "warnings": list(result.warnings),
            **quality,
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def write_fit(path: str | Path, file: FitFile) -> None:
    content = {
        "format": FORMAT,
        **file.law.to_dict(),
        "intervals": file.intervals,
        "range": file.range,
        "data": file.data,
        "quality": file.quality,
        "created": file.created,
    }
    if file.bootstrap:
        drawn = file.bootstrap
        content["bootstrap"] = {
            "level": drawn.level, "thetas": drawn.thetas.tolist(), "unknown": drawn.unknown,
            "loss_sizes": drawn.loss_sizes,
        }  # fmt: skip
    # NaN is no JSON: what is unknown is null.
    Path(path).write_text(json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="allow")

    runs: Annotated[int, Field(ge=1, le=10**9)]
    source: str
    sizes: list[Positive] = []
    synthetic: bool = False


class _Bootstrap(BaseModel):
    level: Annotated[Positive, Field(lt=1)]
    thetas: Annotated[list[list[Finite]], Field(min_length=1)]
    unknown: list[str] | None = None
    loss_sizes: list[Positive] | None = []
    """Files from before trunks were told apart have no such key: their intervals of the loss are too narrow."""

    def bind(self, form: LawForm) -> Bootstrap:
        """InputError where one of the resampled laws is not sound."""
        try:
            for theta in self.thetas:
                form.bind(form.values(theta))
        except InputError as error:
            raise InputError(f"bootstrap.thetas: {error.key}", error.value, error.problem) from None
        return Bootstrap(
            form=form,
            thetas=np.array(self.thetas),
            level=self.level,
            unknown=form.level_parameters if self.unknown is None else tuple(self.unknown),
            loss_sizes=None if self.loss_sizes is None else tuple(self.loss_sizes),
        )


class _Content(BaseModel):
    format: Literal[1]
    form: str
    coefficients: dict[str, Finite]
    intervals: dict[str, tuple[Finite, Finite]]
    range: dict[str, tuple[Positive, Positive]]
    data: _Data
    quality: dict[str, Any]
    created: str
    bootstrap: _Bootstrap | None = None


def read_fit(path: str | Path) -> FitFile:
    """InputError, with the field, where the file is none of ours, of another format, or holds no sound law."""
    again = "Make the file again with `qatscale fit`."
    try:
        content = _Content.model_validate_json(Path(path).read_bytes(), strict=True)
        law = law_from_dict({"form": content.form, "coefficients": content.coefficients})
        if law.form.one_width and "bits" not in content.range:
            raise InputError("range.bits", None, f"is missing; {law.form.name} describes one bit width.")
        drawn = content.bootstrap.bind(law.form) if content.bootstrap else None
    except OSError as error:
        raise InputError("fit", str(path), f"cannot be read: {error.strerror}.", again) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {field}" if field else str(path), None, f"{first['msg']}.", again) from None
    except InputError as error:
        raise InputError(f"{path}: {error.key}", error.value, error.problem, again) from None
    return FitFile(
        law=law,
        intervals=content.intervals,
        bootstrap=drawn,
        range=content.range,
        data=content.data.model_dump(),
        quality=content.quality,
        created=content.created,
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
