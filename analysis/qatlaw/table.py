"""The runs a law is fitted on, as a checked table: one row a finished run.

Units: parameters, tokens and bits are plain counts (86e6, 2.3e9, 4), losses are nats per token. A fit with a wrong unit
succeeds and is wrong, so magnitudes that no training run has are refused here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from qatlaw.bit_widths import UNQUANTIZED_BITS
from qatlaw.errors import InputError, did_you_mean, nearest
from qatlaw.laws.base import Floats, Points
from qatlaw.names import VAL_LOSS
from qatlaw.text import listed

COLUMNS = ("n_params", "bits", "tokens_fp", "tokens_qat", "loss", "scheme")
"""Columns that a table must have. Others (run_id, name...) are kept; `synthetic` marks runs that nobody trained."""
TEXT = ("validation_fingerprint", "validation_tokens")
"""The held-out text that a loss was measured on: hash of the split, tokens read of it; empty where not known."""
TOTAL = ("tokens", "tokens_total")
"""Either one, with qat_fraction, stands for tokens_fp and tokens_qat."""
OPTIONAL = ("qat_fraction", *TOTAL, "seed", "name", "run_id", "trial", "effective_bits", *TEXT)
"""Columns that are used where a table has them."""
POINT = (*(name for name in COLUMNS if name != "loss"), "seed", *TEXT, "settings")
"""Columns that distinguish points, as far as a table has them. `settings`: those of the recipe that no law knows. Rows
of one point differ in `trial`, the optimizer's settings."""
SAME_COUNT = 1.02
"""Ratio of token counts up to which the held-out text is the same: counts are cut to complete sequences."""
SCHEMES = {
    "fp": ("full precision to the end", True, False),
    "sequential": ("full precision with its own cooldown, then QAT with its own schedule", True, True),
    "fused": ("full precision without a cooldown, then QAT, one cooldown for both", True, True),
    "scratch": ("QAT from the first token", False, True),
    "ptq": ("full precision, quantized after training", True, False),
}
"""By name: meaning, whether its runs have tokens_fp, whether they have tokens_qat."""
MIXED_SCHEMES = ("sequential", "fused")
"""Schemes with two phases of training, whose split has an optimum."""

SOUND = {
    "n_params": (1e4, 1e14, "parameters", "Write the count itself: 86M is 86000000."),
    "tokens_total": (1e4, 1e16, "tokens of both phases", "Write the count itself: 2.3B is 2300000000."),
    "bits": (1, 32, "bits per quantized weight", "Ternary weights count as 2 bits or as 1.58, never in bytes."),
    "loss": (0.01, 20, "nats per token", "A perplexity is exp(loss); bits per token are loss / ln 2."),
    "tokens_per_parameter": (0.01, 1e6, "tokens per parameter", "n_params and tokens are in different units."),
}
"""Magnitudes of a training run [ours]: low, high, unit, advice. Beyond them a unit is wrong."""


def points_of(frame: pd.DataFrame) -> Points:
    """The rows as laws take them. PTQ rows count as full-precision runs: leave them out first."""
    return Points.of(*(frame[name].to_numpy(np.float64) for name in ("n_params", "tokens_fp", "tokens_qat", "bits")))


@dataclass(frozen=True)
class RunTable:
    """Checked runs. Build it with `from_frame` or `read`."""

    frame: pd.DataFrame
    source: str

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        source: str = "a data frame",
        columns: Mapping[str, str] | None = None,
        scheme: str | None = None,
    ) -> RunTable:
        """InputError for a missing column, a value that is not a number, a wrong unit or a run that occurs twice.

        columns: our name to the frame's own, where they differ.
        scheme: of runs with two phases, in a frame without a column `scheme`.
        """
        checked = _renamed(_mapped(frame, columns or {}, source)).reset_index(drop=True)
        checked = _completed(checked, source, scheme)
        if missing := [name for name in COLUMNS if name not in checked.columns]:
            problem = f"{', '.join(missing)} missing."
            raise InputError(f"{source}: columns", list(map(str, frame.columns)), problem, _advice(missing, frame))
        if checked.empty:
            raise InputError(f"{source}: rows", 0, "are too few: a table of runs has at least one.")
        for name in COLUMNS[:-1]:
            numbers = pd.to_numeric(checked[name], errors="coerce").astype(np.float64)
            _refuse(source, name, checked[name], ~np.isfinite(numbers), "is not a finite number.", "Write a number.")
            checked[name] = numbers
        _check_schemes(checked, source)
        total = checked["tokens_fp"] + checked["tokens_qat"]
        derived = {"tokens_total": total, "tokens_per_parameter": total / checked["n_params"]}
        for name, (low, high, unit, advice) in SOUND.items():
            values = derived.get(name, checked.get(name))
            problem = f"{unit} must lie between {low:g} and {high:g}; is a unit wrong?"
            _refuse(source, name, values, ~values.between(low, high), problem, advice)
        if "run_id" in checked.columns:
            again = checked["run_id"].duplicated()
            _refuse(source, "run_id", checked["run_id"], again, "a run is counted once.", "Keep one row of each.")
        again = checked.duplicated([name for name in (*POINT, "trial") if name in checked.columns])
        if again.any():
            first = checked.loc[again, [name for name in COLUMNS if name != "loss"]].iloc[0].to_dict()
            problem = f"{int(again.sum())} runs have the settings of another run."
            fix = "Add a seed column to distinguish repeats, and delete true duplicates."
            raise InputError(f"{source}: rows", first, problem, fix)
        return cls(checked, source)

    @classmethod
    def read(cls, path: str | Path, columns: Mapping[str, str] | None = None, scheme: str | None = None) -> RunTable:
        """A table from a .csv or .parquet file, see `from_frame`. InputError where it cannot be read."""
        file = Path(path)
        readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
        if file.suffix not in readers:
            raise InputError("table", str(path), "is not a .csv or .parquet file.")
        if not file.is_file():
            raise InputError("table", str(path), "no such file.")
        try:
            frame = readers[file.suffix](file)
        except Exception as error:
            raise InputError("table", str(path), f"cannot be read: {error}.") from error
        cells = frame.loc[:, frame.dtypes.eq(object).to_numpy()]
        if frame.columns.nlevels > 1 or not cells.map(pd.api.types.is_hashable).all(axis=None):
            raise InputError("table", str(path), "holds lists, mappings or columns of several levels.", "Flatten it.")
        if len(frame.columns) == 1 and any(mark in str(frame.columns[0]) for mark in ";\t"):
            raise InputError("table", str(path), "separates its columns by other marks than commas.", "Write commas.")
        return cls.from_frame(frame, file.name, columns, scheme)

    def __len__(self) -> int:
        return len(self.frame)

    def column(self, name: str) -> Floats:
        return self.frame[name].to_numpy(np.float64)

    @property
    def tokens_total(self) -> Floats:
        return self.column("tokens_fp") + self.column("tokens_qat")

    @property
    def tokens_per_byte(self) -> Floats:
        """S of each run."""
        return self.tokens_total / (self.column("n_params") * self.column("bits") / 8)

    @property
    def loss(self) -> Floats:
        return self.column("loss")

    @cached_property
    def points(self) -> Points:
        return points_of(self.frame)

    @property
    def quantized(self) -> NDArray[np.bool_]:
        return self.column("tokens_qat") > 0

    @property
    def widths(self) -> list[float]:
        """Bit widths of its quantized runs, rising."""
        return sorted(set(self.column("bits")[self.quantized].tolist()))

    @property
    def mixed_schemes(self) -> dict[str, int]:
        """Number of runs of its two-phase schemes, most first."""
        counts = self.frame["scheme"].value_counts()
        present = [name for name in MIXED_SCHEMES if name in counts]
        return {name: int(counts[name]) for name in sorted(present, key=lambda name: -counts[name])}

    @cached_property
    def trunks(self) -> NDArray[np.int64]:
        """[runs]: equal for runs of one size and seed, which share a trunk; without a column `seed`, of one size. Seed
        1+2 is the trunk of seed 1 with another order of the cooldown's data."""
        frame = self.frame[["n_params"]]
        if "seed" in self.frame.columns:
            frame = frame.assign(seed=self.frame["seed"].astype(str).str.partition("+")[0])
        return frame.groupby(list(frame.columns), dropna=False).ngroup().to_numpy(np.int64)

    @property
    def names(self) -> pd.Series:
        """The names of the runs, or else their rows, counted from 1."""
        if "name" in self.frame.columns:
            return self.frame["name"]
        return pd.Series(self.frame.index + 1).map("row {}".format)

    @property
    def synthetic(self) -> bool:
        """Whether any of its losses was drawn from a made-up law."""
        return "synthetic" in self.frame.columns and bool(self.frame["synthetic"].any())

    @property
    def hash(self) -> str:
        """Hash of what a fit reads; the order of the runs does not count."""
        rows = self.frame[list(COLUMNS)].sort_values(list(COLUMNS))
        text = "\n".join(",".join(map(repr, row)) for row in rows.itertuples(index=False, name=None))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of what a law fitted on it has seen; `s_total` over its quantized runs."""
        spans = {"n_params": self.column("n_params"), "tokens": self.tokens_total}
        if (quantized := self.quantized).any():
            spans |= {"bits": self.column("bits")[quantized], "s_total": self.tokens_per_byte[quantized]}
        return {name: (float(values.min()), float(values.max())) for name, values in spans.items()}

    def where(self, keep: NDArray[np.bool_] | Sequence[bool]) -> RunTable:
        return RunTable(self.frame[np.asarray(keep, dtype=bool)].reset_index(drop=True), self.source)

    @property
    def on_effective_bits(self) -> RunTable:
        """The same runs with stored bits per parameter in place of nominal ones. InputError where they are unknown."""
        key = f"{self.source}: effective_bits"
        if "effective_bits" not in self.frame.columns:
            raise InputError(
                key, None, "the table has no such column.", "Add it, or fit on runs that have their recipes."
            )
        stored = pd.to_numeric(self.frame["effective_bits"], errors="coerce").astype(np.float64)
        _refuse(self.source, "effective_bits", self.frame["effective_bits"], ~np.isfinite(stored), "is not known.")
        return RunTable(self.frame.assign(nominal_bits=self.frame["bits"], bits=stored), self.source)

    def effective_bits(self, N: ArrayLike, B: ArrayLike) -> NDArray[np.float64]:
        """Effective bits at nominal B, linear between the widths of the quantized runs of the size nearest to N."""
        runs = self.on_effective_bits.where(self.quantized)
        sizes, nominal, stored = runs.column("n_params"), runs.column("nominal_bits"), runs.column("bits")
        known = np.unique(sizes)
        N, B = np.broadcast_arrays(np.asarray(N, np.float64), np.asarray(B, np.float64))
        nearest = known[np.abs(np.log(N[..., None] / known)).argmin(axis=-1)]
        effective = np.empty(N.shape)
        for size in np.unique(nearest):
            order = np.argsort(np.where(sizes == size, nominal, np.inf))[: (sizes == size).sum()]
            effective[nearest == size] = np.interp(B[nearest == size], nominal[order], stored[order])
        return effective

    @property
    def bits_kind(self) -> Literal["nominal", "effective"]:
        return "effective" if "nominal_bits" in self.frame.columns else "nominal"

    def of_width(self, bits: float) -> RunTable:
        """Its full-precision runs, and the quantized ones of this bit width."""
        return self.where(((self.frame["scheme"] == "fp") | (self.frame["bits"] == bits)).to_numpy())

    def of_scheme(self, scheme: str) -> RunTable:
        """Its full-precision runs, and those of this two-phase scheme."""
        if scheme not in MIXED_SCHEMES:
            raise InputError("scheme", scheme, f"is not one of {', '.join(MIXED_SCHEMES)}.")
        return self.where(self.frame["scheme"].isin(["fp", scheme]).to_numpy())

    def check_text(self) -> None:
        """InputError where runs are known to be validated on different text: their losses do not compare."""
        if any(name not in self.frame.columns for name in TEXT):
            return
        splits = self.frame[TEXT[0]].fillna("").astype(str)
        counts = pd.to_numeric(self.frame[TEXT[1]], errors="coerce")
        if splits[splits != ""].nunique() < 2 and not counts.max() > SAME_COUNT * counts.min():
            return
        texts = []
        groups = self.names.groupby([splits, counts], dropna=False)
        for (split, count), group in sorted(groups, key=lambda pair: -len(pair[1])):
            tokens = "an unknown number of" if np.isnan(count) else f"{count:,.0f}"
            where = f"split {split[:8]}" if split else "one split"
            texts.append(f"{len(group)} on {tokens} tokens of {where} ({listed([*map(str, group)])})")
        problem = f"the runs were validated on different text, so their losses do not compare: {'; '.join(texts)}."
        fix = "Name a folder, an experiment or a table with the runs of one text alone."
        raise InputError(f"{self.source}: held-out text", None, problem, fix)


def _mapped(frame: pd.DataFrame, columns: Mapping[str, str], source: str) -> pd.DataFrame:
    """With our names for the columns that have others; a column of our name that means something else is dropped."""
    for ours, own in columns.items():
        if ours not in (*COLUMNS, *OPTIONAL):
            raise InputError(
                "--column", ours, "is not a column of a table of runs.", did_you_mean(ours, COLUMNS + OPTIONAL)
            )
        if own not in frame.columns:
            raise InputError(
                f"{source}: --column {ours}", own, "no such column.", did_you_mean(own, map(str, frame.columns))
            )
    others = frame.drop(columns=[name for name in columns if name in frame.columns and name not in columns.values()])
    return others.rename(columns={own: ours for ours, own in columns.items()})


def _advice(missing: Sequence[str], frame: pd.DataFrame) -> str:
    """What a table needs, with the columns that the missing ones may be."""
    unused = [str(name) for name in frame.columns if name not in (*COLUMNS, *OPTIONAL)]
    sought, phases = list(missing), ("tokens_fp", "tokens_qat")
    if {*phases} <= {*missing} and len({nearest(name, unused) for name in phases} - {None}) < 2:  # all tokens, a share
        sought = [name for name in (*missing, "tokens", "qat_fraction") if name not in (*phases, *frame.columns)]
    similar = {name: close for name in sought if (close := nearest(name, unused))}
    fixes = []
    if similar:
        options = " ".join(f"--column {name}={own}" for name, own in similar.items())
        fixes.append(f"Try {options} (in Python: columns={similar}).")
    if "scheme" in missing:
        fixes.append("Add scheme (fp, sequential, fused), or name that of all runs with two phases: --scheme fused.")
    if set(missing) - similar.keys() - {"scheme"} or not fixes:
        fixes.append(
            "A table of runs has n_params, bits, loss, scheme, and either tokens_fp and tokens_qat (0 for "
            "full-precision runs) or tokens and qat_fraction."
        )
    return " ".join(fixes)


def _completed(frame: pd.DataFrame, source: str, scheme: str | None) -> pd.DataFrame:
    """With the columns that follow from others: tokens of both phases, the scheme, the bits of full precision."""
    filled = frame.copy()
    total = next((name for name in TOTAL if name in filled.columns), None)
    if total and "qat_fraction" in filled.columns and not {"tokens_fp", "tokens_qat"} <= set(filled.columns):
        tokens, share = (pd.to_numeric(filled[name], errors="coerce") for name in (total, "qat_fraction"))
        problem, fix = "is not a share of the tokens between 0 and 1.", "Write 15 % as 0.15."
        _refuse(source, "qat_fraction", filled["qat_fraction"], ~share.between(0, 1), problem, fix)
        filled["tokens_qat"] = share * tokens
        filled["tokens_fp"] = tokens - filled["tokens_qat"]
    if not {"tokens_fp", "tokens_qat"} <= set(filled.columns):
        return filled
    fp, qat = (pd.to_numeric(filled[name], errors="coerce") for name in ("tokens_fp", "tokens_qat"))
    if "scheme" not in filled.columns and (scheme or not ((fp > 0) & (qat > 0)).any()):
        filled["scheme"] = np.select([qat == 0, fp == 0], ["fp", "scratch"], default=scheme or "")
    if "bits" in filled.columns:
        filled["bits"] = filled["bits"].where(filled["bits"].notna() | (qat != 0), UNQUANTIZED_BITS)
    return filled


def _renamed(frame: pd.DataFrame) -> pd.DataFrame:
    """With our names for those that qatscale's tracking writes, with or without MLflow's prefixes."""
    names = {}
    for column in map(str, frame.columns):
        bare = column.removeprefix("metrics.").removeprefix("params.")
        known = bare.lower() in (*COLUMNS, *OPTIONAL)
        names[column] = "loss" if bare == VAL_LOSS else bare.lower() if known else bare
    for name in COLUMNS:
        same = [column for column, new in names.items() if new == name]
        if len(same) > 1:
            raise InputError("columns", same, f"all of them mean {name}.", "Keep one.")
    return frame.rename(columns={column: names[str(column)] for column in frame.columns})


def _check_schemes(frame: pd.DataFrame, source: str) -> None:
    scheme = frame["scheme"].astype(str)
    _refuse(source, "scheme", scheme, ~scheme.isin(list(SCHEMES)), f"is not one of {', '.join(SCHEMES)}.")
    for name in ("tokens_fp", "tokens_qat"):
        _refuse(source, name, frame[name], frame[name] < 0, "is negative: a phase has 0 tokens or more.")
    # The phases' tokens and the scheme say the same thing twice: where they differ, one of them is wrong.
    for name, (meaning, has_fp, has_qat) in SCHEMES.items():
        wrong = ((frame["tokens_fp"] > 0) != has_fp) | ((frame["tokens_qat"] > 0) != has_qat)
        phases = f"tokens_fp {'above' if has_fp else '='} 0 and tokens_qat {'above' if has_qat else '='} 0"
        _refuse(source, "scheme", scheme, wrong & (scheme == name), f"{meaning}: its runs have {phases}.")


def _refuse(source: str, name: str, values: pd.Series, wrong: pd.Series, problem: str, fix: str = "") -> None:
    """InputError with the first of the wrong rows, if any is wrong."""
    rows = np.flatnonzero(wrong)
    if not len(rows):
        return
    shown = values.iloc[int(rows[0])]
    shown = shown.item() if isinstance(shown, np.generic) else shown
    others = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
    raise InputError(f"{source}: {name} of row {rows[0] + 1}{others}", shown, problem, fix)
