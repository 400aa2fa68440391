"""The cooldown laboratory: what branches of one trunk say about shapes, AdamW and length of the cooldown.

Branches that differ in the data of the cooldown alone are repeats. With losses L_1 ... L_k of such branches, and L_avg
the loss of the model with their averaged weights, the parts of their loss above the best averaged model are

    variance = mean(L_i) - L_avg          bias = L_avg - min over the compared settings of L_avg

On a quadratic loss with curvature H the variance part is half the trace of H times the (population) covariance of the
branches' weights. A k-th of the branches' own variance remains in L_avg, so k branches show (k - 1)/k of it. arXiv
2508.01483 compares shapes by bias and variance; its formula is not available to us, so ours stands beside the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from qatlaw.laws.base import Floats
from qatlaw.measurement import settings_with_effect
from qatlaw.names import AVERAGED, FIRST_STEP, VAL_LOSS, VAL_LOSS_PTQ
from qatlaw.runs import RunRecord

SEED = "data.cooldown_seed"
_NOT_OF_A_SHAPE = ("shape", "warmup_", "cooldown_", "phases")
"""Prefixes of the keys of `schedule` that no shape has for its own."""
_IN_THE_FINAL = ("evaluation.", "tokens", "qat.scheme", "qat.bits", "qat.fraction")
POINT = ["scheme", "bits", "n_params", "tokens", "rest"]
"""Columns of one trunk and quantizer."""
ADAMW = ["beta2", "beta1", "weight_decay"]
DESIGN = ["shape", *ADAMW, "cooldown", "fraction"]
"""Columns of what the branches of a point differ in, beside the order of their data."""
CONFIDENCE = 0.95
_NEEDED = (VAL_LOSS, "scheme", "bits", "n_params", "tokens_total")


def branches_of(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The trained runs in groups that differ in the cooldown's data alone, each by its seed."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if AVERAGED not in record.final and record.kind == "training" and record.final.get(VAL_LOSS) is not None:
            own = {key: text for key, text in settings_with_effect(record.recipe).items() if key != SEED}
            groups.setdefault(json.dumps(own, sort_keys=True), []).append(record)
    return [sorted(group, key=lambda record: int(record.recipe.get(SEED, "0"))) for group in groups.values()]


def branch_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """A row a finished run and average: POINT, DESIGN, `order` of the cooldown's data, `loss`, and of averages the
    number of checkpoints (`averaged`, 0 for a run), the `window` they span as a share of the tokens, and the loss with
    scales calibrated anew (`recalibrated`). `usual`: with the AdamW of most trained runs of its scheme.

    A shape's name is followed by its settings where they are not those of most runs of that shape.
    """
    rows = [record for record in records if all(record.final.get(key) is not None for key in _NEEDED)]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame([_row(record) for record in rows])
    for shape, own in pd.DataFrame([_shape_settings(record.recipe) for record in rows]).groupby("shape"):
        texts = _texts(own.loc[:, own.nunique(dropna=False) > 1].fillna(""))
        most = _most(texts)
        frame.loc[own.index, "shape"] = [shape if text == most else f"{shape} {text}" for text in texts]
    adamw = _texts(frame[ADAMW])
    trained = adamw[frame["averaged"] == 0].groupby(frame["scheme"]).agg(_most)
    return frame.assign(usual=adamw == frame["scheme"].map(trained))


def _texts(columns: pd.DataFrame) -> pd.Series:
    """The values of each row."""
    return pd.Series([" ".join(map(str, row)) for row in columns.itertuples(index=False)], columns.index)


def _most(values: pd.Series) -> Any:
    """The most frequent value; of equals the first."""
    return values.value_counts(sort=False).idxmax()


def _shape_settings(recipe: Mapping[str, str]) -> dict[str, str]:
    """The shape, and the settings that shapes may have."""
    keys = {key.removeprefix("schedule."): text for key, text in recipe.items() if key.startswith("schedule.")}
    own = {key: text for key, text in keys.items() if not key.startswith(_NOT_OF_A_SHAPE)}
    return {"shape": keys.get("shape", ""), **own}


def _row(record: RunRecord) -> dict[str, Any]:
    recipe, final = settings_with_effect(record.recipe), record.final
    scheme, bits, tokens = final["scheme"], float(final["bits"]), float(final["tokens_total"])
    phase = "cooldown" if scheme == "fp" else "qat_cooldown"

    def in_cooldown(key: str) -> Any:
        own = _value(recipe, f"schedule.phases.{phase}.{key}")
        return _value(recipe, f"optimizer.{key}") if own is None else own

    betas = in_cooldown("betas") or (math.nan, math.nan)
    other = (SEED, *_IN_THE_FINAL, *["qat."] * (scheme == "fp"))
    rest = {key: text for key, text in recipe.items() if not key.startswith(other)}
    rest = {key: text for key, text in rest.items() if key.startswith("schedule.warmup_") or "schedule." not in key}
    own_window = 1 - final[FIRST_STEP] * _step_tokens(recipe) / tokens if FIRST_STEP in final else 0.0
    return {
        "name": record.name, "scheme": scheme, "bits": bits, "n_params": float(final["n_params"]), "tokens": tokens,
        "rest": json.dumps(rest, sort_keys=True),
        "beta1": float(betas[0]), "beta2": float(betas[1]), "weight_decay": float(in_cooldown("weight_decay") or 0),
        "cooldown": _share(recipe, tokens), "fraction": round(float(final.get("qat_fraction") or 0), 4),
        "order": int(recipe.get(SEED, "0")), "loss": float(final[VAL_LOSS]), "averaged": int(final.get(AVERAGED, 0)),
        "window": own_window, "recalibrated": float(final.get(f"{VAL_LOSS_PTQ}{bits:g}", math.nan)),
    }  # fmt: skip


def _value(recipe: Mapping[str, str], key: str) -> Any:
    """A recipe's value; None where it has none."""
    try:
        return json.loads(recipe.get(key, "null"))
    except ValueError:
        return recipe[key]


def _step_tokens(recipe: Mapping[str, str]) -> float:
    return float(recipe["batch.sequences"]) * float(recipe["data.sequence_length"])


def _share(recipe: Mapping[str, str], tokens: float) -> float:
    """The cooldown's share of the tokens, which a recipe gives in either unit."""
    share, length = (_value(recipe, f"schedule.cooldown_{unit}") for unit in ("fraction", "tokens"))
    return float(share) if share is not None else 0.2 if length is None else float(length) / tokens


def interval(values: Floats) -> tuple[float, float]:
    """(mean, half the width of Student's interval for it at CONFIDENCE); NaN for a single value's width."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    width = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(width)


def differences(rows: pd.DataFrame, column: str, base: Any) -> pd.DataFrame:
    """Loss of each value of `column` above that of `base`, over pairs with the same data: mean, half-width, pairs.

    Pairs share trunk and order of the cooldown's data, whose noise cancels. Sorted by the mean.
    """
    table = rows.pivot_table("loss", [*POINT, "order"], column, observed=True)
    found = []
    for value in table.columns:
        pairs = (table[value] - table[base]).dropna().to_numpy(np.float64)
        if len(pairs):
            found.append((value, *interval(pairs), len(pairs)))
    return pd.DataFrame(found, columns=[column, "above", "half_width", "pairs"]).sort_values("above", kind="stable")


def bias_and_variance(rows: pd.DataFrame) -> pd.DataFrame:
    """By shape the mean loss of its branches, the loss of their averaged weights, and the two parts.

    rows: of one point, trained runs and averages of branches. Left out are shapes with fewer branches than others, and
    those that were averaged before all of their branches were done.
    """
    trained = rows[rows["averaged"] == 0].groupby("shape")["loss"]
    orders = rows[rows["averaged"] == 0].groupby("shape")["order"].nunique()
    found = pd.DataFrame({"mean": trained.mean(), "branches": orders})
    most = max(rows["averaged"].max(), 2)  # an average of fewer branches keeps more of their variance
    averages = rows[rows["averaged"] == most]
    found["averaged"] = averages.groupby("shape")["loss"].mean()
    found = found[found["branches"] == most].dropna()
    found["variance"] = found["mean"] - found["averaged"]
    found["bias"] = found["averaged"] - found["averaged"].min()
    return found.sort_values("mean").reset_index()
