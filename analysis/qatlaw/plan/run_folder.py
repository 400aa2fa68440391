"""What a plan needs of a run that was trained so far: read from the JSON files of its folder, without torch.

run.json                               n_params
timeline.json                          tokens_per_step, segments
checkpoints/step-00000120/manifest.json   step, tokens, plugin.switched_at; written last
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlaw.errors import LawError

OPTION = "--from-checkpoint"
_STEP = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a full-precision phase."""

    run: str
    """Its folder, as it was given."""
    step: int
    """Optimizer steps done."""
    params: int
    tokens: int
    tokens_per_step: int
    warmup_steps: int
    """Of the schedule it was trained with."""
    cooled: bool
    """Whether its cooldown is over: then QAT needs a schedule of its own."""
    cooling: bool
    """Whether it lies inside of its cooldown."""

    @property
    def checkpoint(self) -> str:
        return f"{self.run}@{self.step}"


def read_trained(what: str) -> Trained:
    """The newest checkpoint of a run's folder, or that of RUN@STEP, or a checkpoint's folder.

    LawError where there is none, where a file cannot be read, and where QAT began before it.
    """
    checkpoint = _find(what)
    run = checkpoint.parent.parent
    manifest, about, timeline = (
        _read(path) for path in (checkpoint / "manifest.json", run / "run.json", run / "timeline.json")
    )
    try:
        step = int(manifest["step"])
        switched = manifest["plugin"]["switched_at"]
        segments = [segment for segment in timeline["segments"] if not segment["quantized"]]
        cooldowns = [segment for segment in segments if segment["phase"] == "cooldown"]
        trained = Trained(
            run=str(run) if Path(what) == checkpoint else what.removesuffix(f"@{step}"),
            step=step,
            params=int(about["n_params"]),
            tokens=int(manifest["tokens"]),
            tokens_per_step=int(timeline["tokens_per_step"]),
            warmup_steps=sum(s["end"] - s["start"] for s in segments if s["phase"] == "warmup"),
            cooled=any(segment["end"] <= step for segment in cooldowns),
            cooling=any(segment["start"] < step < segment["end"] for segment in cooldowns),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LawError(OPTION, what, f"a file of it lacks something: {error!r}.") from error
    if switched is not None:
        raise LawError(
            OPTION,
            what,
            f"was trained in QAT since step {switched}.",
            f"Give an earlier one: RUN@STEP up to {switched}.",
        )
    return trained


def _find(what: str) -> Path:
    path, at = Path(what), ""
    if not path.exists() and "@" in what:
        text, _, at = what.rpartition("@")
        path = Path(text)
    if _STEP.match(path.name) and (path / "manifest.json").is_file():
        return path
    if not (path / "run.json").is_file():
        told = "The folder does not exist." if not path.is_dir() else "It holds no run.json."
        raise LawError(OPTION, what, "no run's folder and no checkpoint.", told)
    found = {int(match[1]): file.parent for file in sorted((path / "checkpoints").glob("step-*/manifest.json"))
             if (match := _STEP.match(file.parent.name))}  # fmt: skip
    if not found:
        raise LawError(OPTION, what, "has no checkpoint yet.")
    if at and (not at.isdigit() or int(at) not in found):
        raise LawError(OPTION, what, f"no checkpoint at step {at}; there are: {', '.join(map(str, found))}.")
    return found[int(at)] if at else found[max(found)]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LawError(OPTION, str(path), f"cannot be read: {error}.") from error
