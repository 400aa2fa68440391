"""Run folders of qatscale as records. It reads run.json, recipe.yaml, done.json and metrics.jsonl, without qatscale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlaw.errors import InputError
from qatlaw.run_files import read_run_file


@dataclass(frozen=True)
class RunRecord:
    """One run, as tracking records it."""

    run_id: str
    name: str
    status: str
    """FINISHED, or how it ended; of a damaged one the problem."""
    final: Mapping[str, Any]
    """Numbers and `scheme` by their stable names; unknown ones are missing."""
    recipe: Mapping[str, str]
    """Dotted key to text, as MLflow's parameters have it."""
    created: float = 0.0
    """Any clock: the later of two records of the same run counts."""
    kind: str = "training"
    """`training`; `fit` for the record of a fitted law; `imported` for a model that was trained elsewhere; `damaged`
    for a folder that cannot be read."""


def folder_records(output: Path) -> list[RunRecord]:
    """The run in a folder, or the runs in a folder of run folders, oldest first; empty where none is found."""
    files = [output / "run.json"] if (output / "run.json").is_file() else output.glob("*/run.json")
    return sorted((run_record(file.parent) for file in files), key=lambda record: (record.created, record.name))


def run_record(folder: Path) -> RunRecord:
    """A run's folder as MLflow would have the run. A file that cannot be read makes a record of kind `damaged`."""
    name = folder.resolve().name
    try:
        run, recipe = (read_run_file(folder / file) for file in ("run.json", "recipe.yaml"))
        done = folder / "done.json"
        return RunRecord(
            run_id=run["id"],
            name=name,
            status="FINISHED" if done.is_file() else _last_event(folder),
            final=read_run_file(done)["metrics"] if done.is_file() else {},
            recipe=flatten({key: value for key, value in recipe.items() if key != "tracking"})
            | flatten(run.get("resolved", {})),
            created=run["created"],
            kind="imported" if run.get("imported") else "training",
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        problem = f"{Path(str(error.value)).name} {error.problem}" if isinstance(error, InputError) else str(error)
        return RunRecord(str(folder.resolve()), name, " ".join(problem.split()), {}, {}, kind="damaged")


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


def _last_event(folder: Path) -> str:
    """How an unfinished run ended, as far as its folder says."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    events = [json.loads(line)["event"] for line in lines[-1:]]
    return events[0] if events and events[0] in ("stopped", "failed") else "not done"
