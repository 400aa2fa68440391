"""What a plan needs to know about a run, read from two small JSON files of its folder, without torch.

run.json         n_params
timeline.json    tokens_per_step, switch_step, and segments with phase, start, end and quantized

The step of a checkpoint is in its folder's name; a checkpoint is complete once it has a manifest.json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qatlaw.errors import InputError

KEY = "RUN"
FUSED_COOLDOWN = 0.2
"""Share of all tokens, the default of a recipe; less where the QAT phase is shorter."""
_STEP = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a full-precision phase."""

    run: str
    step: int
    """Optimizer steps done."""
    params: int
    tokens_per_step: int
    warmup_steps: int
    """Length of the warm-up in the schedule it was trained with."""
    cooled: bool
    """Whether its cooldown is over: then QAT needs a schedule of its own."""
    cooling: bool

    @property
    def checkpoint(self) -> str:
        return f"{self.run}@{self.step}"

    @property
    def tokens(self) -> int:
        return self.step * self.tokens_per_step

    @property
    def warnings(self) -> tuple[str, ...]:
        if not self.cooling:
            return ()
        return ("the checkpoint lies inside its run's cooldown: branch from the stable phase before it, or its end",)

    def overrides(self, tokens: int, tokens_qat: int) -> tuple[str, ...]:
        """The scheme that fits the checkpoint's point of its schedule, for `tokens_qat` of `tokens` in QAT."""
        if self.cooled:
            return ("qat.scheme=sequential",)
        # At the stable rate, QAT takes over and holds the one cooldown. The warm-up keeps its length in tokens.
        cooldown = min(round(FUSED_COOLDOWN * tokens / self.tokens_per_step), tokens_qat // self.tokens_per_step)
        return (
            "qat.scheme=fused",
            "schedule.warmup_fraction=null",
            f"schedule.warmup_tokens={self.warmup_steps * self.tokens_per_step}",
            "schedule.cooldown_fraction=null",
            f"schedule.cooldown_tokens={cooldown * self.tokens_per_step}",
        )


def read_trained(what: str) -> Trained:
    """The newest checkpoint of a run's folder, or that of RUN@STEP, or a checkpoint's folder.

    InputError where no checkpoint is found, a file cannot be read, or QAT began before the checkpoint.
    """
    from qatlaw.run_files import read_run_file

    try:
        run, step = _find(what)
    except OSError as error:
        raise InputError(KEY, what, f"cannot be read: {error.strerror}.") from None
    about, timeline = (read_run_file(run / name) for name in ("run.json", "timeline.json"))
    segments = [segment for segment in timeline["segments"] if not segment["quantized"]]
    cooldowns = [segment for segment in segments if segment["phase"] == "cooldown"]
    trained = Trained(
        run=str(run),
        step=step,
        params=about["n_params"],
        tokens_per_step=timeline["tokens_per_step"],
        warmup_steps=sum(s["end"] - s["start"] for s in segments if s["phase"] == "warmup"),
        cooled=any(segment["end"] <= step for segment in cooldowns),
        cooling=any(segment["start"] < step < segment["end"] for segment in cooldowns),
    )
    if not step:
        fix = "Plan by numbers, --trained-tokens 60B --params 396M, or convert the model with --trained-tokens."
        raise InputError(KEY, what, "counts no trained tokens.", fix)
    switch = timeline["switch_step"]
    if switch is not None and switch < step:
        fix = f"Give an earlier one: RUN@STEP up to {switch}."
        raise InputError(KEY, what, f"was trained in QAT since step {switch}.", fix)
    return trained


def _find(what: str) -> tuple[Path, int]:
    """The run's folder and the checkpoint's step."""
    path, at = Path(what), ""
    if not path.exists() and "@" in what:
        text, _, at = what.rpartition("@")
        path = Path(text)
    if (match := _STEP.match(path.name)) and (path / "manifest.json").is_file():
        return path.resolve().parent.parent, int(match[1])
    if not (path / "run.json").is_file():
        why = "It holds no run.json." if path.is_dir() else "The folder does not exist."
        raise InputError(KEY, what, "is neither a run's folder nor a checkpoint.", why)
    names = [file.parent.name for file in sorted((path / "checkpoints").glob("step-*/manifest.json"))]
    steps = [int(match[1]) for match in map(_STEP.match, names) if match]
    if not steps:
        raise InputError(KEY, what, "has no checkpoint yet.")
    if at and (not at.isdecimal() or int(at) not in steps):
        raise InputError(KEY, what, f"has no checkpoint at step {at}.", f"Take one of {', '.join(map(str, steps))}.")
    return path, int(at or steps[-1])
