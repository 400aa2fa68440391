"""The runs a law is fitted on, as a checked table: one row a finished run.

Units: parameters, tokens and bits are plain counts (86e6, 2.3e9, 4), losses are nats per token. A wrong unit does not
fail a fit, it makes it wrong; so magnitudes that no training run has are refused here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qatlaw.errors import InputError
from qatlaw.laws.points import Floats, Points
from qatlaw.names import VAL_LOSS, VAL_LOSS_FP

COLUMNS = ("n_params", "bits", "tokens_fp", "tokens_qat", "loss", "scheme")
"""What a table must have. Others (run_id, name...) are kept; `synthetic` marks runs that nobody trained."""
NUMBERS = COLUMNS[:-1]
TEXT = ("validation_fingerprint", "validation_tokens")
"""The held-out text that a loss was measured on: hash of the split, tokens read of it; empty where not known."""
POINT = (*(name for name in COLUMNS if name != "loss"), "seed", *TEXT, "settings")
"""What tells points apart, as far as a table has it. `settings`: of the recipe, those that no law knows. Rows of one
point differ in `trial`, the optimizer's settings."""
SAME_COUNT = 1.02
"""Ratio of token counts up to which the held-out text is the same: counts are cut to whole sequences."""
ALIASES = {VAL_LOSS: "loss", VAL_LOSS_FP: "loss_fp_view"}
"""Names as the tracking of qatscale writes them, with or without MLflow's `metrics.` and `params.` before them."""
SCHEMES = {
    "fp": "full precision to the end",
    "sequential": "full precision with its own cooldown, then QAT with its own schedule",
    "fused": "full precision without a cooldown, then QAT, one cooldown for both",
    "scratch": "QAT from the first token",
    "ptq": "full precision, quantized after training",
}
MIXED_SCHEMES = ("sequential", "fused")
"""Those with two phases of training, whose split has an optimum."""

SOUND = {
    "n_params": (1e4, 1e14, "parameters", "Write the count itself: 86M is 86000000."),
    "tokens_total": (1e4, 1e16, "tokens of both phases", "Write the count itself: 2.3B is 2300000000."),
    "bits": (1, 32, "bits per quantized weight", "Ternary weights count as 2 bits or as 1.58, never in bytes."),
    "loss": (0.01, 20, "nats per token", "A perplexity is exp(loss); bits per token are loss / ln 2."),
    "tokens_per_parameter": (0.01, 1e6, "tokens per parameter", "n_params and tokens are in different units."),
}
"""What a training run can have [ours]: low, high, unit, advice. Beyond it a unit is wrong."""


@dataclass(frozen=True)
class RunTable:
    """Runs that were checked. Build it with `from_frame` or `read_table`."""

    frame: pd.DataFrame
    source: str

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, source: str = "a data frame") -> RunTable:
        """InputError where a column is missing, a number is none, a unit is wrong or a run is in it twice."""
        renamed = _renamed(frame)
        missing = [name for name in COLUMNS if name not in renamed.columns]
        if missing:
            raise InputError(
                f"{source}: columns",
                list(map(str, frame.columns)),
                f"{', '.join(missing)} missing.",
                f"A table of runs has {', '.join(COLUMNS)}; tokens_qat is 0 for full-precision runs.",
            )
        if renamed.empty:
            raise InputError(f"{source}: rows", 0, "a table of runs has at least one.")
        checked = renamed.reset_index(drop=True)
        for name in NUMBERS:
            checked[name] = _numbers(checked[name], name, source)
        _check_schemes(checked, source)
        _check_magnitudes(checked, source)
        _check_duplicates(checked, source)
        return cls(checked, source)

    def __len__(self) -> int:
        return len(self.frame)

    def column(self, name: str) -> Floats:
        return self.frame[name].to_numpy(np.float64)

    @property
    def tokens_total(self) -> Floats:
        return self.column("tokens_fp") + self.column("tokens_qat")

    @property
    def loss(self) -> Floats:
        return self.column("loss")

    @cached_property
    def points(self) -> Points:
        """The runs as laws take them. PTQ rows are full-precision runs there: leave them out first."""
        return Points.of(*(self.column(name) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")))

    @property
    def quantized(self) -> NDArray[np.bool_]:
        """Which runs have QAT tokens."""
        return self.column("tokens_qat") > 0

    @property
    def widths(self) -> list[float]:
        """Bit widths of its quantized runs, rising."""
        return sorted(set(self.column("bits")[self.quantized].tolist()))

    @cached_property
    def trunks(self) -> NDArray[np.int64]:
        """[runs]: equal for runs of one size and seed, which share a trunk; without a column `seed`, of one size."""
        key = ["n_params", "seed"] if self.has_seeds else ["n_params"]
        return self.frame.groupby(key, dropna=False).ngroup().to_numpy(np.int64)

    @property
    def names(self) -> pd.Series:
        """What to call the runs: their names, or else their rows, counted from 1."""
        return (
            self.frame["name"] if "name" in self.frame.columns else pd.Series(self.frame.index + 1).map("row {}".format)
        )

    @property
    def has_seeds(self) -> bool:
        return "seed" in self.frame.columns

    @property
    def synthetic(self) -> bool:
        """Whether any of its losses was drawn from a made-up law."""
        return "synthetic" in self.frame.columns and bool(self.frame["synthetic"].any())

    @property
    def hash(self) -> str:
        """Of what a fit reads: the same runs in any order have the same one."""
        rows = self.frame[list(COLUMNS)].sort_values(list(COLUMNS))
        text = "\n".join(",".join(map(repr, row)) for row in rows.itertuples(index=False, name=None))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def where(self, keep: NDArray[np.bool_] | Sequence[bool]) -> RunTable:
        """The runs where `keep` is true, in their order."""
        return RunTable(self.frame[np.asarray(keep, dtype=bool)].reset_index(drop=True), self.source)

    def of_width(self, bits: float) -> RunTable:
        """Its full-precision runs, and the quantized ones of this bit width."""
        at_width = (self.column("bits") == bits) & (self.frame["scheme"] != "fp").to_numpy()
        return self.where((self.frame["scheme"] == "fp").to_numpy() | at_width)

    def of_scheme(self, scheme: str) -> RunTable:
        """Its full-precision runs, and those of this two-phase scheme."""
        if scheme not in MIXED_SCHEMES:
            raise InputError("scheme", scheme, f"one of {', '.join(MIXED_SCHEMES)}.")
        return self.where(self.frame["scheme"].isin(["fp", scheme]).to_numpy())

    def check_text(self) -> None:
        """InputError where runs are known to be validated on different text: their losses do not compare."""
        if any(name not in self.frame.columns for name in TEXT):
            return
        names = self.frame[TEXT[0]].fillna("").astype(str)
        counts = pd.to_numeric(self.frame[TEXT[1]], errors="coerce")
        if names[names != ""].nunique() < 2 and not counts.max() > SAME_COUNT * counts.min():
            return
        told = []
        groups = self.names.groupby([names, counts], dropna=False)
        for (name, count), group in sorted(groups, key=lambda pair: -len(pair[1])):
            shown = ", ".join(map(str, group[:3])) + (", …" if len(group) > 3 else "")
            amount = "an unknown number of" if np.isnan(count) else f"{count:,.0f}"
            told.append(f"{len(group)} on {amount} tokens of {f'split {name[:8]}' if name else 'one split'} ({shown})")
        raise InputError(
            f"{self.source}: held-out text",
            None,
            f"the runs were validated on different text, so their losses do not compare: {'; '.join(told)}.",
            "Name a folder, an experiment or a table with the runs of one text alone.",
        )

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of what a law fitted on it has seen; `s_total` over its quantized runs."""
        quantized = self.quantized
        s_total = self.tokens_total / (self.column("n_params") * self.column("bits") / 8)
        spans = {"n_params": self.column("n_params"), "tokens": self.tokens_total}
        if quantized.any():
            spans |= {"bits": self.column("bits")[quantized], "s_total": s_total[quantized]}
        return {name: (float(values.min()), float(values.max())) for name, values in spans.items()}


def read_table(path: str | Path) -> RunTable:
    """A table of runs from a .csv or .parquet file. InputError where it cannot be read or is no such table."""
    file = Path(path)
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if file.suffix not in readers:
        raise InputError("table", str(path), "a .csv or .parquet file.")
    if not file.is_file():
        raise InputError("table", str(path), "no such file.")
    try:
        frame = readers[file.suffix](file)
    except Exception as error:
        raise InputError("table", str(path), f"cannot be read: {error}.") from error
    return RunTable.from_frame(frame, source=file.name)


def _renamed(frame: pd.DataFrame) -> pd.DataFrame:
    names = {}
    for column in map(str, frame.columns):
        bare = column.removeprefix("metrics.").removeprefix("params.")
        names[column] = ALIASES.get(bare, bare)
    taken = list(names.values())
    for name in COLUMNS:
        if taken.count(name) > 1:
            both = [column for column, new in names.items() if new == name]
            raise InputError("columns", both, f"all of them mean {name}.", "Keep one.")
    return frame.rename(columns={column: names[str(column)] for column in frame.columns})


def _numbers(values: pd.Series, name: str, source: str) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    wrong = ~np.isfinite(numbers.to_numpy())
    if wrong.any():
        _refuse_rows(source, name, values, wrong, "every run has a finite number there.", "Leave such runs out.")
    return numbers


def _check_schemes(frame: pd.DataFrame, source: str) -> None:
    scheme = frame["scheme"].astype(str)
    unknown = ~scheme.isin(list(SCHEMES)).to_numpy()
    if unknown.any():
        _refuse_rows(source, "scheme", scheme, unknown, f"one of {', '.join(SCHEMES)}.")
    for name, wrong in (("tokens_fp", frame["tokens_fp"] < 0), ("tokens_qat", frame["tokens_qat"] < 0)):
        if wrong.any():
            _refuse_rows(source, name, frame[name], wrong.to_numpy(), "0 tokens or more.")
    # bits, the phases' tokens and the scheme say the same thing twice; where they differ one of them is wrong.
    phases = dict.fromkeys(MIXED_SCHEMES, (True, True)) | {
        "fp": (True, False),
        "ptq": (True, False),
        "scratch": (False, True),
    }
    for name, (has_fp, has_qat) in phases.items():
        wrong = ((frame["tokens_fp"] > 0) != has_fp) | ((frame["tokens_qat"] > 0) != has_qat)
        wrong &= scheme == name
        if wrong.any():
            told = " and ".join(
                f"{phase} {'above' if has else '='} 0"
                for phase, has in (("tokens_fp", has_fp), ("tokens_qat", has_qat))
            )
            _refuse_rows(source, "scheme", scheme, wrong.to_numpy(), f"{SCHEMES[name]}: its runs have {told}.")


def _check_magnitudes(frame: pd.DataFrame, source: str) -> None:
    total = frame["tokens_fp"] + frame["tokens_qat"]
    derived = {"tokens_total": total, "tokens_per_parameter": total / frame["n_params"]}
    for name, (low, high, unit, advice) in SOUND.items():
        values = derived.get(name, frame.get(name))
        wrong = ((values < low) | (values > high)).to_numpy()
        if wrong.any():
            _refuse_rows(source, name, values, wrong, f"{unit}, {low:g} to {high:g}; is a unit wrong?", advice)


def _check_duplicates(frame: pd.DataFrame, source: str) -> None:
    if "run_id" in frame.columns and (again := frame["run_id"].duplicated().to_numpy()).any():
        _refuse_rows(source, "run_id", frame["run_id"], again, "a run is counted once.", "Keep one row of each.")
    key = [name for name in (*POINT, "trial") if name in frame.columns]
    again = frame.duplicated(key).to_numpy()
    if again.any():
        first = frame.loc[again, [name for name in COLUMNS if name != "loss"]].iloc[0].to_dict()
        raise InputError(
            f"{source}: rows",
            first,
            f"{int(again.sum())} runs with settings that another run has too.",
            "Repeats need a seed column that tells them apart; of true duplicates keep one.",
        )


def _refuse_rows(
    source: str, name: str, values: pd.Series, wrong: NDArray[np.bool_], allowed: str, do: str = ""
) -> None:
    rows = np.flatnonzero(wrong)
    shown = values.iloc[int(rows[0])]
    shown = shown.item() if isinstance(shown, np.generic) else shown
    counted = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
    raise InputError(f"{source}: {name} of row {rows[0] + 1}{counted}", shown, allowed, do)
