"""Shell completion of recipes, run folders and keys. `qatscale --install-completion` switches it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def recipe_or_file(incomplete: str) -> list[str]:
    """Recipes by name, and YAML files."""
    from qatscale.config.recipe import recipe_names

    named = [name for name in recipe_names() if name.startswith(incomplete)]
    return [*named, *_paths(incomplete, lambda path: path.suffix in (".yaml", ".yml"))]


def recipe_or_key(incomplete: str) -> list[str]:
    """What `qatscale config` takes."""
    from qatscale.config.settings import sections, settings

    keys = (key for key in (*sections(), *settings()) if ".phases." not in key)
    return [*recipe_or_file(incomplete), *sorted(key for key in keys if key.startswith(incomplete))]


def override(incomplete: str) -> list[str]:
    """Keys of a recipe, as far as their equals sign."""
    from qatscale.config.settings import settings

    return [f"{key}=" for key in settings() if key.startswith(incomplete)]


def run(incomplete: str) -> list[str]:
    """Run folders, those in runs/ where nothing is typed yet, and the folders that lead to them."""
    return _paths(incomplete or "runs/", lambda path: (path / "run.json").is_file())


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Folders, and wanted paths, that begin with the typed text."""
    folder, _, start = incomplete.rpartition("/")
    place = Path(f"{folder}/" if folder or incomplete.startswith("/") else ".")
    if not place.is_dir():
        return []
    found = []
    for path in sorted(place.iterdir()):
        if path.name.startswith(start) and (start or not path.name.startswith(".")):
            shown = str(path)
            found += [shown] if wanted(path) else [f"{shown}/"] if path.is_dir() else []
    return found
