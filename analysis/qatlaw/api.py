"""The functions of `import qatlaw`: runs as a pandas DataFrame, a law fitted to them, a report; and where runs are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from qatlaw.errors import InputError
from qatlaw.page import compose, write_report
from qatlaw.results import holds_results, read_results
from qatlaw.run_folders import folder_records
from qatlaw.runs import Collected, best_trials, collect
from qatlaw.summary import Summary, form_named, scheme_of, summarise
from qatlaw.table import RunTable


def read_table(
    path: str | Path, columns: Mapping[str, str] | None = None, *, scheme: str | None = None
) -> pd.DataFrame:
    """The checked runs of a .csv or .parquet file, or of a study's results.csv; one row a run.

    columns: our name to the file's own, where they differ: {"loss": "val_loss"}. A table has n_params, bits, loss, and
    either tokens_fp and tokens_qat or tokens and qat_fraction.
    scheme: of the runs with two phases, where the file has no column `scheme`.

    The best trial of each point counts. `frame.attrs["left_out"]` names the runs that were left out, with the reason.
    InputError (a ValueError) for whatever is wrong, with the row.
    """
    return from_table(path, columns, scheme).frame


def read_runs(
    folder: str | Path | None = None, *, experiment: str | None = None, uri: str | None = None
) -> pd.DataFrame:
    """The finished runs of a folder of run folders, or of an MLflow experiment; one row a run, as `read_table`.

    uri: of the MLflow store; None: MLFLOW_TRACKING_URI, or ./mlflow.db.
    """
    if (folder is None) == (experiment is None):
        raise InputError("source", folder and str(folder), "give one: a folder, or an experiment.")
    return (from_folder(folder) if folder else from_experiment(experiment or "", uri)).frame


def fit(
    runs: pd.DataFrame,
    form: str = "qat_unified",
    *,
    scheme: str | None = None,
    bits: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Summary:
    """Fit a form of law to runs. The result holds the law, intervals, errors and the measured U-curves.

    form: qat_unified for all bit widths; qat_per_bits or a rival law by name for one, which `bits` chooses.
    scheme: sequential or fused, if the runs have both.
    resamples: of the bootstrap behind the intervals; 0: no intervals.

    InputError where the runs cannot determine the law.
    """
    chosen = form_named(form)
    table = Collected.from_frame(runs, scheme).table
    if bits is not None:
        table = table.of_width(bits)
    elif chosen.one_width and len(table.widths) > 1:
        raise InputError("bits", table.widths, f"{form} is a law of one bit width.", "Choose one of them.")
    (summary,) = summarise(chosen, table, scheme_of(table, scheme), resamples=resamples, seed=seed)
    return summary


def report(
    runs: pd.DataFrame,
    folder: str | Path = "report",
    *,
    form: str = "qat_unified",
    scheme: str | None = None,
    law: str | None = None,
    resamples: int = 200,
    compare: bool = True,
) -> Path:
    """Write report.html, with its figures beside it, into `folder`; returns the path of the page.

    law: the path of a fit.json or a law's name, to draw it instead of fitting one.
    compare: whether rival laws are fitted too, and judged on runs that none was fitted on.
    """
    content = compose(Collected.from_frame(runs, scheme), form, scheme, law, resamples=resamples, compare=compare)
    return write_report(content, Path(folder))


def from_table(path: str | Path, columns: Mapping[str, str] | None = None, scheme: str | None = None) -> Collected:
    """A .csv or .parquet file of anyone's runs, or the results.csv of a study. For `columns`: `RunTable.read`."""
    if not holds_results(Path(path)):
        return best_trials(RunTable.read(path, columns, scheme))
    if columns:
        raise InputError("--column", dict(columns), "has no effect on a study's results.csv.", "Leave it out.")
    return collect(read_results(Path(path)), str(path))


def from_folder(folder: str | Path) -> Collected:
    """The runs of a folder of run folders, or of one run folder. InputError where no run is finished."""
    records = folder_records(Path(folder))
    if not records:
        raise InputError("--runs", str(folder), "holds no runs.", "Name a folder of run folders.")
    return collect(records, str(folder))


def from_experiment(experiment: str, uri: str | None = None, progress: Callable[[], None] = lambda: None) -> Collected:
    """The runs of an MLflow experiment. `uri`: of the store; None: MLFLOW_TRACKING_URI, or ./mlflow.db.

    progress: called after each page of runs.
    """
    from qatlaw.mlflow_runs import mlflow_records

    store = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    return collect(mlflow_records(store, experiment, progress), f"experiment {experiment}")
