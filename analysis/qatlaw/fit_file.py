"""`fit.json`: a fitted law with its intervals, the range and hash of its runs, and its quality.

Somebody who plans by a law must see what stands behind it, so nothing of it is optional but the intervals.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qatlaw.errors import LawError
from qatlaw.intervals import Bootstrap
from qatlaw.laws.base import Law

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


def read_fit(path: str | Path) -> FitFile:
    """LawError for a file that is none of ours, of another format, or with coefficients no law has."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise LawError("fit", str(path), f"cannot be read: {error}.", "Make one with `qatscale fit`.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise LawError("fit", str(path), f"format {found}: this version reads format {FORMAT}.", "Fit again.")
    missing = [name for name in ("form", "coefficients", "intervals", "range", "data", "quality", "created")
               if name not in content]  # fmt: skip
    if missing:
        raise LawError("fit", str(path), f"lacks {', '.join(missing)}.", "Fit again.")
    law = Law.from_dict(content)
    drawn = content.get("bootstrap")
    if drawn:
        # Files of versions that did not know of trunks have intervals of the loss that are too narrow: none are given.
        sizes = drawn.get("loss_sizes", ())
        drawn = Bootstrap(
            form=law.form,
            thetas=np.array(drawn["thetas"], np.float64),
            level=drawn["level"],
            unknown=tuple(drawn.get("unknown", law.form.level_parameters)),
            loss_sizes=None if sizes is None else tuple(sizes),
        )
    return FitFile(
        law=law,
        intervals={name: (low, high) for name, (low, high) in content["intervals"].items()},
        bootstrap=drawn,
        range={name: (low, high) for name, (low, high) in content["range"].items()},
        data=content["data"],
        quality=content["quality"],
        created=content["created"],
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
