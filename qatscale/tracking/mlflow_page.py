"""A run's page in MLflow's UI: description, resolved parameters, corpus, and a view with charts.

The view is an experiment tag of the kind that the UI's Share button writes. It lists runs by their final loss: MLflow
nests child runs only in a list by date, so that branches stand beside their trunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qatlaw.bit_widths import bits_label
from qatlaw.run_folders import flatten
from qatscale.config.amounts import format_amount
from qatscale.data.manifest import Manifest
from qatscale.errors import UserError
from qatscale.files import encode
from qatscale.tracking.compare import losses_by_view, view_label
from qatscale.tracking.records import Record
from qatscale.tracking.run_folder import RunFolder, perplexity
from qatscale.tracking.store import VIEW

VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
NOTE_TAG = "mlflow.note.content"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Without it MLflow 3 opens an experiment on its pages about traces of language models."""
_MAX_PARAM = 6000
"""MLflow's limit on the length of a parameter's value."""
_COLUMNS = (
    "tags.`scheme`", "tags.`bits`", "params.`qat.fraction`", "metrics.`final/val_loss`",
    "metrics.`final/val_loss_fp_view`", "tags.`parent`", "tags.`run_status`",
)  # fmt: skip
_CHARTS = (
    ("training", "LINE", "train/loss"),
    ("validation", "LINE", "val/loss_quantized"), ("validation", "LINE", "val/loss_fp"),
    ("final", "BAR", "final/val_loss"), ("final", "BAR", "final/val_loss_fp_view"),
)  # fmt: skip
"""(section, kind, metric) in the order of the page."""
_CLOSED = ("train", "val", "perf", "Model metrics", "System metrics")
"""Collapsed sections below, into which MLflow sorts the charts of all other metrics."""


def view_state() -> str:
    """The view's JSON; MLflow keeps up to 5,000 characters of a tag."""
    names = [*dict.fromkeys(section for section, _, _ in _CHARTS), *_CLOSED]
    charts: list[dict[str, Any]] = []
    for section, kind, metric in _CHARTS:
        chart: dict[str, Any] = {"uuid": metric, "type": kind, "metricSectionId": section, "metricKey": metric}
        if kind == "LINE":  # over tokens, which only records of training have
            over = "metric" if section == "training" else "step"
            chart |= {"selectedMetricKeys": [metric], "xAxisKey": over, "selectedXAxisMetricKey": "train/tokens"}
            chart |= {"useGlobalXaxisKey": False, "xAxisScaleType": "linear", "scaleType": "linear"}
            chart |= {"lineSmoothness": 0, "range": {}, "yAxisKey": "metric", "yAxisExpressions": []}
        charts.append({**chart, "isGenerated": False, "deleted": False, "runsCountToCompare": 20})
    sections = [
        {"uuid": name, "name": name, "columns": 1, "cardHeight": 300, "display": name not in _CLOSED,
         "isReordered": True, "deleted": False, "isGenerated": True}
        for name in names
    ]  # fmt: skip
    return json.dumps(
        {
            "orderByKey": "metrics.`final/val_loss`",
            "orderByAsc": True,
            "selectedColumns": _COLUMNS,
            "columnOrder": ["attributes.`Run Name`", *_COLUMNS],
            "columnWidths": dict.fromkeys(_COLUMNS, 110),
            "runsHiddenMode": "FIRST_20_RUNS",
            "compareRunCharts": charts,
            "compareRunSections": sections,
            "isAccordionReordered": True,
            "hideEmptyCharts": True,
        }
    )


def points(record: Record) -> Iterator[Any]:
    """One event of metrics.jsonl as MLflow's Metrics. Null values are left out; NaN and infinities are kept."""
    from mlflow.entities import Metric

    named: dict[str, Any] = {}
    if record["event"] == "metrics":
        fields = {name: value for name, value in record.items() if name not in _NOT_METRICS}
        named = {f"{'perf' if name in _PERF else 'train'}/{name}": value for name, value in fields.items()}
    elif record["event"] == "validation":
        named = {f"val/{name}_{record['view']}": record.get(name) for name in ("loss", "perplexity")}
    elif record["event"] == "spike":
        named = {"train/spike_norm": record["norm"]}
    elif record["event"] == "final":
        named = record["metrics"]
    for key, value in named.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield Metric(key, float(value), int(record["time"] * 1000), record["step"])


_PERF = {
    "tokens_per_second", "tflops", "mfu", "memory_gib", "data_seconds", "slowest_rank", "slowest_seconds",
    "median_seconds",
}  # fmt: skip
_NOT_METRICS = {"event", "time", "step", "steps", "phase", "warmup"}


def parameters(folder: RunFolder) -> dict[str, str]:
    """A run's recipe as parameters, with the values that `auto` had in it, cut at MLflow's limit.

    Without `tracking`, since the store is not a property of the run.
    """
    recipe = {key: value for key, value in folder.recipe.items() if key != "tracking"}
    flat = flatten(encode(recipe)) | flatten(encode(folder.run.get("resolved", {})))
    return {key: text if len(text) <= _MAX_PARAM else f"{text[: _MAX_PARAM - 1]}…" for key, text in flat.items()}


def description(folder: RunFolder, final: Mapping[str, Any] | None = None) -> str:
    """Markdown: the plan of a run, its parent and, once it has ended, its losses."""
    recipe, timeline, run = folder.recipe, folder.timeline, folder.run
    scheme, steps, switch = recipe["qat"]["scheme"], timeline["steps"], timeline["switch_step"]
    tokens = format_amount(steps * timeline["tokens_per_step"])
    lines = [f"{format_amount(run['n_params'])} parameters, {tokens} tokens in {steps:,} steps"]
    if switch is None:
        lines.append("full precision")
    else:
        share = (steps - switch) / steps
        lines.append(
            f"{scheme} QAT at {bits_label(recipe['qat']['bits'])} from step {switch:,} on ({share:.1%} of the tokens)"
        )
    if run["parent"]:
        lines.append(f"branched from {run['parent']['name']} at step {run['parent']['step']:,}")
    text = f"**Plan:** {'; '.join(lines)}."
    losses = losses_by_view(final, scheme) if final else {}
    ends = [f"{view_label(view)} {loss:.4f} nats (perplexity {perplexity(loss):.4g})" for view, loss in losses.items()]
    return f"{text}\n\n**Validation loss:** {'; '.join(ends)}." if ends else text


def dataset_inputs(folder: RunFolder) -> list[Any]:
    """The run's corpora as MLflow's DatasetInputs, named by their folders and known by their content.

    Without those that cannot be read: a run is uploaded without them.
    """
    inputs = []
    for path in folder.data:
        with suppress(OSError, UserError):
            inputs.append(_dataset_input(path, Manifest.load(path)))
    return inputs


def _dataset_input(path: Path, manifest: Manifest) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    counts = {split: {"documents": part.documents, "tokens": part.tokens} for split, part in manifest.splits.items()}
    dataset = Dataset(
        name=path.name,
        digest=manifest.fingerprint[:36],
        source_type="local",
        source=json.dumps({"uri": path.as_uri(), "fingerprint": manifest.fingerprint}),
        profile=json.dumps(counts),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
