"""A new run's folder: its recipe, its timeline, and the environment that it begins in."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatscale.config.places import without_credentials
from qatscale.errors import UserError
from qatscale.files import write_atomic, write_json
from qatscale.schedule.timeline import Timeline
from qatscale.tracking.environment import environment
from qatscale.tracking.run_folder import RunFolder


def create_run_folder(
    path: Path | str,
    *,
    recipe: str,
    ds_config: Mapping[str, Any],
    timeline: Timeline,
    n_params: int,
    command: Sequence[str],
    parent: Mapping[str, Any] | None = None,
    hosts: Mapping[str, Sequence[int]] | None = None,
    imported: str | None = None,
    resolved: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Write the files that describe a run. run.json comes last, so a folder with run.json has them all.

    `recipe`: resolved YAML. `parent`: ``{"name", "folder", "step"}`` of the run that a branch starts from. `hosts`:
    each host's ranks. `imported`: the origin of a model that the folder holds and did not train. `resolved`:
    by key, the values that `auto` has in this run. Raises UserError where a run exists already.
    """
    folder = RunFolder(path)
    if folder.run_file.exists():
        raise UserError(
            "name", folder.name, f"{folder.path} already holds a run.", "Resume it, or give this run another name."
        )
    for part in (folder.path, folder.logs, folder.checkpoints, folder.figures, folder.exports):
        part.mkdir(parents=True, exist_ok=True)
    around = environment(hosts)
    write_atomic(folder.path / "recipe.yaml", recipe.encode())
    write_json(folder.path / "ds_config.json", _without_secrets(ds_config))
    write_json(folder.path / "environment.json", around)
    write_json(folder.path / "timeline.json", timeline.to_dict())
    run = {
        "name": folder.name,
        "id": uuid.uuid4().hex,
        "created": time.time(),
        "parent": {**parent, "folder": Path(parent["folder"]).resolve()} if parent else None,
        "imported": imported,
        "n_params": n_params,
        "git_commit": around["git"]["commit"] if around["git"] else None,
        "resolved": dict(resolved or {}),
        "command": [without_credentials(argument) for argument in command],
    }
    write_json(folder.run_file, run)
    return folder


def _without_secrets(value: Any, name: str = "") -> Any:
    """DeepSpeed's monitors take keys of services, and addresses with passwords."""
    if isinstance(value, Mapping):
        return {key: _without_secrets(inner, key) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    return "" if name.endswith(("key", "token", "password", "secret")) else without_credentials(value)
