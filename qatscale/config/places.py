"""Where a run's data, ds_config and MLflow store are: absolute, found again after a move, without credentials."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qatlaw.errors import without_credentials as without_credentials
from qatscale.errors import UserError, did_you_mean
from qatscale.files import is_file, is_folder

SQLITE = "sqlite:///"


def expand_user(path: Path) -> Path:
    """No shell expands the ~ in `data.path=~/corpus`."""
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, so a name that happens to begin with ~
        return path


def named_file(key: str, given: str | Path, shipped: Mapping[str, Path]) -> Path:
    """The file that `given` is the path of or, in `shipped`, the name of. UserError about `key` where there is none."""
    if given in shipped:
        return shipped[str(given)]
    path = expand_user(Path(given))
    if is_file(path):
        return path
    if is_folder(path):
        raise UserError(key, str(given), "is a folder.", "Name the file in it.")
    if path.suffix in (".yaml", ".yml", ".json") or os.sep in str(given):
        near = [str(file) for file in path.parent.glob("*") if file.suffix == path.suffix and is_file(file)]
        raise UserError(key, str(given), "no such file.", did_you_mean(str(path), [*near, *shipped]))
    problem = f"no {key.rpartition('.')[2]} or file of this name."
    raise UserError(key, str(given), problem, did_you_mean(str(given), shipped))


def absolute_uri(uri: str) -> str:
    """A tracking URI with an absolute path, where it names one."""
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    if "://" not in uri and uri.lower() != "none" and not uri.startswith(("file:", "databricks")):
        return str(Path(uri).absolute())
    return uri


def absolute_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain data, with absolute paths: what a run remembers, so that it is read from any folder."""
    data, engine, tracking = recipe["data"], recipe["engine"], recipe["tracking"]
    return recipe | {
        "output": str(Path(recipe["output"]).absolute()),
        "data": data | {"path": data["path"] and str(Path(data["path"]).absolute())},
        "engine": engine | {"ds_config": _absolute_file(engine["ds_config"])},
        "tracking": tracking | {"uri": tracking["uri"] and absolute_uri(tracking["uri"])},
    }


def _absolute_file(name: str) -> str:
    """The path of a file; the name of a ds_config that comes with the package stays."""
    path = expand_user(Path(name))
    return str(path.absolute()) if is_file(path) else name


def find_moved(recipe: dict[str, Any], run: Path) -> None:
    """Name data and ds_config by their new places where they were moved together with the folder `run`.

    recipe: what the run remembers, as plain data. A path that exists stays. A relative one, as former versions kept it,
    is first looked for where it was in relation to the run's folder.
    """
    for section, key in (("data", "path"), ("engine", "ds_config")):
        values = recipe.get(section)
        if not isinstance(values, dict):
            continue
        recorded = values.get(key)
        if isinstance(recorded, str) and not (Path(recorded).is_absolute() and Path(recorded).exists()):
            values[key] = moved_with(run, recipe, recorded) or recorded


def moved_with(run: Path, recipe: dict[str, Any], path: str, was: str = "") -> str | None:
    """Where `path` lies if it was moved together with the run's folder; None where nothing is there.

    was: the run's folder when `path` was recorded; by default the one that its recipe names.
    """
    began = was or Path(str(recipe.get("output", "runs"))) / str(recipe.get("name", run.name))
    moved = (run / os.path.relpath(path, began)).resolve()
    return str(moved) if moved.exists() else None
