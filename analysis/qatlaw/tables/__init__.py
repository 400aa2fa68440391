"""Tables of runs that laws are judged on, each with its provenance: NAME.csv and NAME.toml, or a study's results.csv.

Beside the columns of `qatlaw.table`, which hold the fraction as tokens of both phases, a table has

    n_non_embedding   parameters without embedding and head
    a_bits            bits of the activations, 16 where they are not quantized
    group             weights that share a scale; the model's width where a row does
    effective_bits    stored bits per parameter (`qatlaw.effective_bits`)
    method            how integers are quantized, where a table has several ways; FP4 for floats of 4 bits

and NaN where the source does not say. The first, third and fourth follow from the model's shape.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from qatlaw.bit_widths import UNQUANTIZED_BITS
from qatlaw.effective_bits import llama_weights
from qatlaw.errors import InputError
from qatlaw.results import holds_results, read_results
from qatlaw.runs import best_trials, collect, model_shape
from qatlaw.table import RunTable

FOLDER = Path(__file__).parent
SHAPE = ("hidden_size", "layers", "intermediate_size", "vocabulary")
OPTIONAL = ("kv_width", "attention_width", "block_vectors", "tied", "embedding_bits", "group_size")
MORE = ("n_non_embedding", "group", "effective_bits")


class Provenance(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    source: str
    second_hand: bool = False
    """Whether the numbers were read in a summary or off a figure."""
    text: str = "not known"
    """What the losses were validated on."""
    quantized: str = "not known"
    group: str = "not known"
    seeds: int = 1
    notes: str = ""
    licence: str = ""
    columns: dict[str, float | bool] = {}
    """Columns that are equal in all rows."""


@dataclass(frozen=True)
class JudgedTable:
    name: str
    about: Provenance
    runs: RunTable

    @property
    def label(self) -> str:
        return f"{self.name} (second-hand)" if self.about.second_hand else self.name


def table_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.csv"))


def load_table(name: str) -> JudgedTable:
    """A table of this package by name, a study's results.csv, or any table of runs. InputError for anything else."""
    if name in table_names():
        about = Provenance.model_validate(tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8")))
        return _judged(name, about, pd.read_csv(FOLDER / f"{name}.csv").assign(**about.columns))
    path = Path(name)
    if not path.exists():
        problem = f"is neither a table of this package ({', '.join(table_names())}) nor a file."
        raise InputError("TABLE", name, problem, "Name a .csv of runs, such as a study's results.csv.")
    label = path.parent.name if path.stem == "results" else f"{path.parent.name}/{path.stem}".lstrip("/")
    if not holds_results(path):
        return _judged(label, Provenance(title=label, source=str(path)), RunTable.read(path).frame)
    records = read_results(path)
    table = collect(records, label).table
    recipes = {record.run_id: record.recipe for record in records}
    shapes = [model_shape(recipes[run_id.partition("/")[0]]) or {} for run_id in table.frame["run_id"]]
    about = Provenance(
        title=f"{label}: a study of this project",
        source=str(path),
        text="the study's held-out tokens",
        quantized="all matrices of the blocks; the tied embedding at max(4, bits) if its recipe says nothing else",
        group="qat.group_size of the recipe; empty: a row",
        seeds=table.frame["seed"].nunique(),
    )
    return _judged(label, about, table.frame.assign(**pd.DataFrame(shapes, index=table.frame.index)))


def _judged(label: str, about: Provenance, frame: pd.DataFrame) -> JudgedTable:
    return JudgedTable(label, about, best_trials(RunTable.from_frame(_completed(frame), label)).table)


def _completed(frame: pd.DataFrame) -> pd.DataFrame:
    """With all columns of the schema, as far as the shapes give them. A source's own numbers are kept."""
    filled = frame.copy()
    for name, default in (("a_bits", UNQUANTIZED_BITS), ("method", "")):
        filled[name] = filled[name].fillna(default) if name in filled else default
    if set(SHAPE) <= set(filled.columns):
        counted = pd.DataFrame([_counted(row) for row in filled.to_dict("records")], index=filled.index)
        for name in counted:
            filled[name] = filled[name].fillna(counted[name]) if name in filled else counted[name]
    for name in MORE:
        filled[name] = filled[name].astype(np.float64) if name in filled else np.nan
    return filled


def _counted(row: Mapping[str, Any]) -> dict[str, float]:
    """What the shape of a model says of it; empty where the shape is not known."""
    known = {name: row[name] for name in (*SHAPE, *OPTIONAL) if name in row and not pd.isna(row[name])}
    if not set(SHAPE) <= known.keys():
        return {}
    if "group_size" in known:
        known["group_size"] = int(known["group_size"])
    bits = UNQUANTIZED_BITS if row["scheme"] == "fp" else row["bits"]
    weights = llama_weights(**known, bits=bits)
    return {
        "n_params": weights.params,
        "n_non_embedding": weights.params - weights.embedding.weights,
        "group": known.get("group_size", known["hidden_size"]),
        "effective_bits": weights.effective_bits,
    }
