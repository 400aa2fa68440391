"""`fit.json`: a fitted law with its intervals, the range and hash of its runs, and its quality.

Whoever plans by a law must see what stands behind it, so only the intervals are optional.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qatlaw.errors import InputError, first_invalid
from qatlaw.files import read_small, without_duplicates, write_atomic
from qatlaw.fraction import ROUNDING
from qatlaw.laws import FORMS
from qatlaw.laws.base import Floats, Law, LawForm

if TYPE_CHECKING:
    from qatlaw.fitting import FitResult


@dataclass(frozen=True)
class Bootstrap:
    """Laws fitted to resampled runs, and percentile intervals of what follows from them."""

    form: LawForm
    thetas: Floats
    """[resamples, parameters]"""
    level: float = 0.95
    """Share of the resamples inside an interval."""
    unknown: tuple[str, ...] = ()
    """Parameters without an interval: the runs leave them open, or their trunks are too few."""
    loss_sizes: tuple[float, ...] | None = None
    """Sizes N at which losses have an interval; None: any."""

    @cached_property
    def coefficients(self) -> dict[str, tuple[float, float]]:
        """The intervals by parameter, without `unknown`."""
        low, high = self._interval(self.thetas)
        known = [i for i, name in enumerate(self.form.names) if name not in self.unknown]
        return {self.form.names[i]: (float(low[i]), float(high[i])) for i in known}

    def fraction(self, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> tuple[Floats, Floats]:
        """Interval of the optimal fraction."""
        return self._interval(np.stack([self.form.optimal_fraction(theta, N, D_total, B) for theta in self.thetas]))

    def loss(self, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> tuple[Floats, Floats]:
        """Interval of the law's loss in nats, without the noise of a single run; NaN at sizes outside `loss_sizes`."""
        low, high = self._interval(np.stack([self.form.loss(theta, N, D_fp, D_qat, B) for theta in self.thetas]))
        if self.loss_sizes is None:
            return low, high
        sizes = np.array(self.loss_sizes)
        known = (np.abs(np.asarray(N, np.float64)[..., None] / sizes - 1) <= ROUNDING).any(axis=-1)
        return np.where(known, low, np.nan), np.where(known, high, np.nan)

    def _interval(self, values: Floats) -> tuple[Floats, Floats]:
        outside = (1 - self.level) / 2
        low, high = np.quantile(values, [outside, 1 - outside], axis=0)
        return low, high


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]


class Data(BaseModel):
    """The runs behind a law. Also: left_out by reason."""

    model_config = ConfigDict(extra="allow")

    hash: str = ""
    runs: Annotated[int, Field(ge=1, le=10**9)]
    source: str
    sizes: list[Positive] = []
    synthetic: bool = False
    """Whether the runs were drawn from a made-up law."""
    bits: Literal["nominal", "effective"] = "nominal"


class Resampled(BaseModel):
    """`Bootstrap` without its form."""

    level: Annotated[Positive, Field(lt=1)]
    thetas: Annotated[list[list[Finite]], Field(min_length=1)]
    unknown: list[str]
    loss_sizes: list[Positive] | None


class FitFile(BaseModel):
    """The content of a fit.json."""

    format: Literal[1]
    form: str
    coefficients: dict[str, Finite]
    intervals: dict[str, tuple[Finite, Finite]]
    """By parameter; empty without a bootstrap."""
    range: dict[str, tuple[Positive, Positive]]
    """(low, high) of the runs: n_params, tokens, bits, s_total."""
    data: Data
    quality: dict[str, Any]
    """r2, mae, sigma, per_bits, warnings, and fraction_mae where U-curves were measured."""
    created: str
    resampled: Resampled | None = Field(None, alias="bootstrap")

    @property
    def law(self) -> Law:
        """InputError where the form is unknown or a coefficient is not sound."""
        if self.form not in FORMS:
            raise InputError("form", self.form, f"is not one of {', '.join(sorted(FORMS))}.")
        return FORMS[self.form].bind(self.coefficients)

    @property
    def bootstrap(self) -> Bootstrap | None:
        """InputError where one of the resampled laws is not sound."""
        drawn, form = self.resampled, self.law.form
        if drawn is None:
            return None
        try:
            for theta in drawn.thetas:
                form.bind(form.values(theta))
        except InputError as error:
            raise InputError(f"bootstrap.thetas: {error.key}", error.value, error.problem) from None
        sizes = None if drawn.loss_sizes is None else tuple(drawn.loss_sizes)
        return Bootstrap(form, np.array(drawn.thetas), drawn.level, tuple(drawn.unknown), sizes)


def fit_file(result: FitResult, bootstrap: Bootstrap | None = None, **quality: Any) -> FitFile:
    """The file of a fit. `quality`: further measures, e.g. fraction_errors as dictionaries."""
    table, noise = result.table, result.noise
    content = {
        "format": 1,
        "form": result.law.form.name,
        "coefficients": result.law.coefficients,
        "intervals": bootstrap.coefficients if bootstrap else {},
        "range": table.ranges,
        "data": {
            "hash": table.hash,
            "runs": len(table),
            "sizes": sorted(set(table.column("n_params").tolist())),
            "source": table.source,
            "left_out": result.left_out,
            "synthetic": table.synthetic,
            "bits": table.bits_kind,
        },
        "quality": {
            "r2": result.quality.r2,
            "mae": result.quality.mae,
            "sigma": result.quality.sigma,
            "per_bits": {bits: asdict(found) for bits, found in result.per_bits.items()},
            "standard_errors": result.certainty.parameters,
            "noise": {"own": noise.own, "trunk": noise.trunk if noise.trunk_is_known else None},
            "warnings": list(result.warnings),
            **quality,
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if bootstrap:
        content["bootstrap"] = vars(bootstrap) | {"thetas": bootstrap.thetas.tolist()}
    return FitFile.model_validate(content)


def write_fit(path: str | Path, file: FitFile) -> None:
    """Replace the file at once. JSON has no NaN: what is unknown is null."""
    write_atomic(Path(path), f"{file.model_dump_json(by_alias=True, indent=1)}\n".encode())


def read_fit(path: str | Path) -> FitFile:
    """InputError, with the field, where the file is not a fit.json of this format or holds no sound law."""
    again = "Make the file again with `qatscale fit`."
    try:
        text = read_small(Path(path))
        file = FitFile.model_validate_json(text, strict=True)
        json.loads(text, object_pairs_hook=without_duplicates)
        for name in ("n_params", "tokens", *["bits"] * file.law.form.one_width):
            low, high = file.range.get(name, (1, 0))
            if low > high:
                raise InputError(f"range.{name}", file.range.get(name), "is not the (low, high) of the law's runs.")
        _ = file.bootstrap  # raises for an unsound resample
    except OSError as error:
        raise InputError("fit", str(path), f"cannot be read: {error.strerror}.", again) from None
    except ValidationError as error:
        field, _, reason = first_invalid(error).partition(": ")
        raise InputError(f"{path}: {field}", None, f"{reason}.", again) from None
    except InputError as error:
        raise InputError(f"{path}: {error.key}", error.value, error.problem, again) from None
    except ValueError as error:
        raise InputError("fit", str(path), f"cannot be read: {error}.", again) from None
    return file
