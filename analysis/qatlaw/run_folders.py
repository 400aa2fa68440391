"""Run folders of qatscale as records. It reads run.json, recipe.yaml, done.json and metrics.jsonl, without qatscale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qatlaw.runs import RunRecord

_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}
"""How done.json writes numbers that JSON lacks."""


def folder_records(output: Path) -> list[RunRecord]:
    """The run in a folder, or the runs in a folder of run folders, oldest first; empty where none is found."""
    files = [output / "run.json"] if (output / "run.json").is_file() else output.glob("*/run.json")
    return sorted((run_record(file.parent) for file in files), key=lambda record: (record.created, record.name))


def run_record(folder: Path) -> RunRecord:
    """A run's folder as MLflow would have the run. A file that cannot be read makes a record of kind `damaged`."""
    name = folder.resolve().name
    try:
        run = _read_json(folder / "run.json")
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        done = folder / "done.json"
        final = _read_json(done)["metrics"] if done.is_file() else {}
        return RunRecord(
            run_id=run["id"],
            name=name,
            status="FINISHED" if done.is_file() else _last_event(folder),
            final={key: float(value) if value in _NOT_FINITE else value for key, value in final.items()},
            recipe=flatten({key: value for key, value in recipe.items() if key != "tracking"})
            | flatten(run.get("resolved", {})),
            created=run["created"],
            kind="imported" if run.get("imported") else "training",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        problem = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return RunRecord(str(folder.resolve()), name, " ".join(f"{problem}".split()), {}, {}, kind="damaged")


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A recipe as MLflow's parameters have it: dotted keys, strings as they are, everything else as JSON.

    >>> flatten({"qat": {"bits": 4, "scheme": "fused"}, "tokens": None})
    {'qat.bits': '4', 'qat.scheme': 'fused', 'tokens': 'null'}
    """
    flat: dict[str, str] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _last_event(folder: Path) -> str:
    """How an unfinished run ended, as far as its folder says."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    events = [json.loads(line)["event"] for line in lines[-1:]]
    return events[0] if events and events[0] in ("stopped", "failed") else "not done"
