"""From the records of finished runs to a table to fit on: what is used, what is left out and why.

A record is what tracking keeps of a run: its final numbers by their stable names (`final/val_loss`, `n_params`, `bits`,
`tokens_fp`, `tokens_qat`, `scheme`, `validation_fingerprint` ...) and its recipe as flat text. `qatlaw.mlflow_runs`
reads them from MLflow, `qatlaw.run_folders` from the folders of runs.

A law is about points: model size, bits, tokens of both phases, scheme, seed, held-out text and every other setting of
the recipe. Runs that differ in the optimizer's settings alone are trials of one point, represented by the one with the
lowest loss. `qatlaw.measurement` says which keys are which.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from qatlaw.bit_widths import UNQUANTIZED_BITS
from qatlaw.effective_bits import attention_shape, llama_weights
from qatlaw.errors import InputError
from qatlaw.measurement import TRIALS, split_settings
from qatlaw.names import AVERAGED, VAL_LOSS, VAL_LOSS_PTQ
from qatlaw.run_folders import RunRecord as RunRecord
from qatlaw.table import POINT, RunTable
from qatlaw.text import listed

LAW_POINT = ("n_params", "bits", "tokens_fp", "tokens_qat", "scheme")
TEXTS = ("scheme", "data_fingerprint", "validation_fingerprint")
"""Final values that are text, which MLflow keeps as parameters."""
LARGEST = 1e300
"""MLflow's SQL stores keep an infinite number as the largest float."""

SAME_IN_ALL = (
    "data.path", "data_fingerprint", "data.mix", "data.cooldown_mix", "data.sequence_length", "model.vocab_size",
    "qat.group_size", "qat.embedding_bits", "qat.cooldown_fraction", "qat.optimizer_state",
)  # fmt: skip
"""Settings that no law here knows, beside those of the cooldown. Runs that differ in them compare only if the
difference does not matter."""


@dataclass(frozen=True)
class LeftOut:
    name: str
    reason: str


@dataclass(frozen=True)
class Collected:
    """Runs to fit on."""

    table: RunTable
    """One row a point, and one for each post-training quantization of an `fp` run."""
    left_out: tuple[LeftOut, ...] = ()
    notices: tuple[str, ...] = ()
    """Differences between the runs that no law knows."""
    records: tuple[RunRecord, ...] = ()
    """All that was read, trials and averages included; empty for a table of anyone's runs."""

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, scheme: str | None = None) -> Collected:
        """The runs of a data frame, which may come from `frame` below."""
        attrs = frame.attrs
        best = best_trials(RunTable.from_frame(frame, attrs.get("source", "the data frame"), scheme=scheme))
        before = [LeftOut(**one) for one in attrs.get("left_out", ())]
        return cls(best.table, (*before, *best.left_out), tuple(attrs.get("notices", ())))

    @property
    def frame(self) -> pd.DataFrame:
        """The table as a data frame, with source, left_out and notices as its attributes."""
        frame = self.table.frame.copy()
        left_out = [asdict(one) for one in self.left_out]
        frame.attrs = {"source": self.table.source, "left_out": left_out, "notices": list(self.notices)}
        return frame


def collect(records: Iterable[RunRecord], source: str) -> Collected:
    """The points of the runs that ended soundly, each by its best trial. InputError where none is left."""
    left_out, sound = [], []
    records = tuple(records)
    for record in records:
        if record.kind == "fit":
            continue
        if reason := _unfit(record):
            left_out.append(LeftOut(record.name, reason))
        else:
            sound.append(record)
    if not sound:
        reasons = "; ".join(f"{count} {reason}" for reason, count in counted(left_out).items()) or "it holds none"
        fix = "Train some, or name another source."
        raise InputError("runs", source, f"no finished run to fit on: {reasons}.", fix)
    rows, again, unlike = _rows(sound)
    best = best_trials(RunTable.from_frame(pd.DataFrame(rows), source))
    by_id = {record.run_id: record for record in sound}
    points = best.table.frame.to_dict("records")
    ptq = [row for point in points for row in _ptq_rows(point, by_id[point["run_id"]])]
    table = RunTable.from_frame(pd.DataFrame([*points, *ptq]), source)
    notices = _notices([by_id[point["run_id"]] for point in points], unlike)
    return Collected(table, (*left_out, *again, *best.left_out), notices, records)


def best_trials(table: RunTable) -> Collected:
    """Each point of a table by the row with the lowest loss; column `trial` says what rows of one point differ in."""
    if "trial" not in table.frame.columns:
        return Collected(table)
    frame, names = table.frame.fillna({"trial": ""}), table.names
    key = [name for name in POINT if name in frame.columns]
    point = frame.groupby(key, dropna=False, sort=False).ngroup()
    best = point.map(frame.groupby(point)["loss"].idxmin())
    left_out = tuple(
        LeftOut(str(names[i]), f"a trial with a higher loss: {frame['trial'][i]}; the best is {names[best[i]]}")
        for i in frame.index[best != frame.index]
    )
    return Collected(table.where((best == frame.index).to_numpy()), left_out)


def planned_points(records: Sequence[RunRecord]) -> pd.DataFrame:
    """A row a point of runs that are still to be trained: trials of one point are one row, as they are one in a fit."""
    frame = pd.DataFrame(_rows(records)[0])
    return frame.drop_duplicates([name for name in POINT if name in frame.columns], ignore_index=True)


def counted(left_out: Sequence[LeftOut]) -> dict[str, int]:
    """Reason, up to its first colon, to number of runs, most first."""
    return dict(Counter(one.reason.partition(":")[0] for one in left_out).most_common())


def _unfit(record: RunRecord) -> str | None:
    """Why a law cannot use a run; None if it can."""
    if record.kind == "imported":
        return "imported, not trained"
    if record.kind == "damaged":
        return f"damaged: {record.status}"
    if AVERAGED in record.final:
        return "averaged from checkpoints, not trained"
    if record.status != "FINISHED":
        return f"unfinished: {record.status.lower()}"
    missing = [name for name in (*LAW_POINT, VAL_LOSS) if record.final.get(name) is None]
    if missing:
        return f"final metrics missing: {', '.join(missing)}"
    texts = [name for name, value in record.final.items() if isinstance(value, str) and name not in TEXTS]
    if texts:
        return f"damaged: text for a number in its final metrics: {', '.join(texts)}"
    loss = float(record.final[VAL_LOSS])
    if not abs(loss) <= LARGEST:
        return "diverged: its loss is not finite"
    vocabulary = _number(record.recipe.get("model.vocab_size"))
    if vocabulary and loss > math.log(vocabulary):
        return f"diverged: its loss of {loss:.3g} is above ln({vocabulary:.0f}) = {math.log(vocabulary):.3g}, guessing"
    cooldowns = ["schedule.cooldown_fraction", "schedule.cooldown_tokens"]
    cooldowns += ["qat.cooldown_fraction"] if record.final["scheme"] == "sequential" else []
    if any(_number(record.recipe.get(key)) == 0 for key in cooldowns):
        return "without a cooldown: a trunk, whose loss at the stable rate does not compare with a run's end"
    return None


def _rows(records: Sequence[RunRecord]) -> tuple[list[dict[str, Any]], list[LeftOut], list[str]]:
    """(a row a run, runs that were trained again later with the same settings, unlike settings).

    Unlike settings are those in which runs differ that are one point to any law.
    """
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.created):
        groups.setdefault((*(record.final[name] for name in LAW_POINT), _seed(record)), []).append(record)
    rows: dict[str, dict[str, Any]] = {}
    left_out, unlike = [], set()
    for law_point, group in groups.items():
        split = [split_settings(record.recipe, record.final["scheme"]) for record in group]
        settings = [_data_setting(record) | own for record, (own, _) in zip(group, split, strict=True)]
        trials = [trial for _, trial in split]
        # A setting that some lack belongs to a newer version; an optimizer's may be of one phase alone.
        keys = _differing(settings, missing_differs=False)
        unlike.update(keys)
        trial_keys = _differing(trials, missing_differs=True)
        latest: dict[tuple[Any, ...], RunRecord] = {}
        for record, own, trial in zip(group, settings, trials, strict=True):
            tokens = record.final.get("validation_tokens")
            text = record.final.get("validation_fingerprint") or "", None if tokens is None else float(tokens)
            same = (*text, _listed(own, keys), _listed(trial, trial_keys))
            if same in latest:
                left_out.append(LeftOut(latest[same].name, f"trained again: as {record.name}, which is later"))
                del rows[latest[same].run_id]
            latest[same] = record
            columns = (*LAW_POINT, "seed", "validation_fingerprint", "validation_tokens", "settings", "trial")
            rows[record.run_id] = {
                **dict(zip(columns, (*law_point, *same), strict=True)),
                "loss": float(record.final.get(VAL_LOSS, math.nan)),
                "effective_bits": effective_bits(record, record.final["bits"]),
                "run_id": record.run_id,
                "name": record.name,
            }
    ids = dict.fromkeys(record.run_id for record in records)  # a copied folder has the id of its original
    return [rows[run_id] for run_id in ids if run_id in rows], left_out, sorted(unlike)


def _differing(settings: Sequence[Mapping[str, str]], missing_differs: bool) -> list[str]:
    differing = []
    for key in sorted({key for one in settings for key in one}):
        values = {one.get(key) for one in settings}
        if len(values if missing_differs else values - {None}) > 1:
            differing.append(key)
    return differing


def _listed(settings: Mapping[str, str], keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={settings[key]}" for key in keys if key in settings)


def _data_setting(record: RunRecord) -> dict[str, str]:
    """The training data: by its content, or by its path where the run is still to be trained."""
    if fingerprint := record.final.get("data_fingerprint"):
        return {"data_fingerprint": fingerprint}
    return {"data.path": record.recipe["data.path"]} if "data.path" in record.recipe else {}


def _ptq_rows(point: Mapping[str, Any], record: RunRecord) -> list[dict[str, Any]]:
    """A row for each post-training quantization of a full-precision run."""
    rows = []
    for name, loss in record.final.items() if point["scheme"] == "fp" else ():
        if name.startswith(VAL_LOSS_PTQ) and loss is not None and abs(loss) < LARGEST:
            bits = float(name.removeprefix(VAL_LOSS_PTQ))
            ptq = {"bits": bits, "scheme": "ptq", "loss": float(loss), "run_id": f"{record.run_id}/ptq{bits:g}"}
            ptq["effective_bits"] = effective_bits(record, bits)
            rows.append({**point, **ptq})
    return rows


def effective_bits(record: RunRecord, bits: float) -> float | None:
    """Stored bits per parameter of a run's model at `bits`, by its recipe, to a thousandth; None where it lacks keys.

    Scales have the type of training's forward: fp32 where the ds_config is named so, else 16 bits.
    """
    shape = model_shape(record.recipe)
    if shape is None:
        return None
    if bits >= UNQUANTIZED_BITS:
        shape["embedding_bits"] = None
    plain_bits = 32 if "fp32" in record.recipe.get("engine.ds_config", "") else UNQUANTIZED_BITS
    return round(float(llama_weights(**shape, bits=bits, plain_bits=plain_bits).effective_bits), 3)


def model_shape(recipe: Mapping[str, str]) -> dict[str, Any] | None:
    """What `llama_weights` needs to know of a recipe's model, without its bits; None where the recipe lacks keys."""
    keys = ("hidden_size", "layers", "intermediate_size", "vocab_size", "heads")
    known = [number for key in keys if (number := _number(recipe.get(f"model.{key}"))) is not None]
    if len(known) < len(keys):
        return None
    width, layers, intermediate, vocabulary, heads = known
    group = _number(recipe.get("qat.group_size"))
    return {
        "hidden_size": width,
        "layers": layers,
        "intermediate_size": intermediate,
        "vocabulary": vocabulary,
        **attention_shape(
            width,
            heads,
            kv_heads=_number(recipe.get("model.kv_heads")),
            head_dim=_number(recipe.get("model.head_dim")),
            attention_bias=recipe.get("model.attention_bias") == "true",
            qk_norm=recipe.get("model.qk_norm") == "true",
        ),
        "tied": recipe.get("model.tied_embedding", "true") == "true",
        "embedding_bits": _number(recipe.get("qat.embedding_bits")),
        "group_size": int(group) if group else None,
    }


def _seed(record: RunRecord) -> str:
    """The seed of weights, data and cooldown's data, in short where they are usual: runs with another are repeats."""
    weights, data, cooldown = (record.recipe.get(key, "0") for key in ("seed", "data.seed", "data.cooldown_seed"))
    return (weights if weights == data else f"{weights}/{data}") + (f"+{cooldown}" if cooldown != "0" else "")


def _notices(records: Sequence[RunRecord], unlike: Sequence[str]) -> tuple[str, ...]:
    notices = []
    split = [split_settings(record.recipe, record.final["scheme"]) for record in records]
    settings = [own | trial | _data_setting(record) for record, (own, trial) in zip(records, split, strict=True)]
    cooldown = sorted({key for own in settings for key in own if key.startswith("schedule.")})
    cooldown = [key for key in cooldown if not key.startswith(TRIALS)]
    for key in dict.fromkeys((*SAME_IN_ALL, *cooldown, *unlike)):
        values = sorted({own[key] for own in settings if key in own})
        if len(values) > 1:
            notices.append(f"the runs differ in {key} ({listed(values)}), which the law does not know")
    return tuple(notices)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
