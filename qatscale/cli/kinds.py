"""What a path on a command line is, for a command that reads paths of another kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from qatscale.files import is_file, is_folder

_CHECKPOINT = ("evaluate", "generate", "export", "convert", "average", "landscape", "plan checkpoint")
_USES = {
    "a run": ("resume", "compare", "track-sync", "branch", *_CHECKPOINT, "train --branch-from"),
    "a checkpoint": ("branch", *_CHECKPOINT, "train --branch-from"),
    "a folder of runs": ("runs", "fit --runs", "report --runs"),
    "a study's folder": ("study run", "study status", "study average"),
    "a study file": ("study plan", "study run"),
    "a recipe": ("train", "config", "plan --recipe", "convert --recipe"),
    "a folder of prepared data": ("train data.path", "evaluate --data"),
    "a model for transformers": ("generate", "convert", "evaluate --harness"),
    "a table": ("judge", "fit --table", "report --table"),
    "a fitted law": ("plan --law", "report --law"),
    "a landscape": ("report --landscape",),
    "a text": ("prepare",),
}
"""Kind -> the commands that read it, with the option that it belongs to."""
_HELD = {
    "run.json": "a run", "tree.json": "a study's folder", "landscape.json": "a landscape",
    "checkpoints": "a run", "config.json": "a model for transformers", "manifest.json": "a folder of prepared data",
    "*/run.json": "a folder of runs",
}  # fmt: skip
_FILES = (
    ("a fitted law", ".json", rb'"coefficients"'),
    ("a study file", ".yaml", rb"(?m)^(sizes|grids|bits|fractions|schemes):"),
    ("a recipe", ".yaml", rb"(?m)^(optimizer|qat):"),
    ("a table", ".csv .parquet", rb""),
    ("a text", ".txt .jsonl", rb""),
)
"""(kind, endings, what its start holds)"""


def hints(words: Sequence[str]) -> Iterator[str]:
    """A line for each path that the command does not read as what it is, and for each name of a run in runs/."""
    command, option = " ".join(words[: 2 if words[:1] in (["plan"], ["study"]) else 1]), ""
    for word in words[1:]:
        key, equals, value = word.partition("=")
        before, option = (key if equals else option), (word if word.startswith("-") else "")
        path = value if equals else word
        kind = _kind(Path(path)) if path and before not in ("--out", "--figure", "output") else ""
        run = Path("runs", path.partition("@")[0])
        if not (kind or equals or is_folder(Path(path))) and _kind(run) == "a run":
            yield f"hint: {run} is a run"
        uses = _USES.get(kind, ())
        if kind and command not in uses and not any(before and use.endswith(f" {before}") for use in uses):
            yield f"hint: {path} is {kind}; what reads it: {', '.join(uses)}"


def _kind(path: Path) -> str:
    if is_folder(path):
        if path.name.startswith("step-"):
            return "a checkpoint"
        return next((kind for name, kind in _HELD.items() if any(path.glob(name))), "")
    if not is_file(path):
        return ""
    start = b""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(1 << 14)
    found = (kind for kind, ends, mark in _FILES if path.suffix in ends.split() and re.search(mark, start))
    return next(found, "")
